"""The token cache: written once, read while it grows, taken up after a stop, mended if damaged."""

import fcntl
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuneloom.data import tokens
from tuneloom.data.ledger import Ledger
from tuneloom.data.plan import Plan, PlanConfig, epoch_order
from tuneloom.data.render import Renderer
from tuneloom.data.rows import Rows, open_rows
from tuneloom.data.tokens import TokenStore
from tuneloom.errors import DataError

Maker = Callable[..., Any]
COUNT = 2_000
LIMIT = 30


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    file = tmp_path / "rows.jsonl"
    with file.open("w") as out:
        for i in range(COUNT):
            answer = " ".join(["word"] * (1 + i % 20))
            row = {"prompt": f"question {i}: ", "completion": answer, "source": f"s{i % 3}"}
            out.write(json.dumps(row) + "\n")
    return open_rows(file)


@pytest.fixture
def renderer(make_tokenizer: Maker) -> Renderer:
    return Renderer(make_tokenizer())


def shard_files(store: TokenStore) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in store.folder.glob("*.arrow")}


def finish(store: TokenStore) -> None:
    store.lengths(np.arange(COUNT))


def test_what_is_read_is_what_the_renderer_makes(
    tmp_path: Path, rows: Rows, renderer: Renderer
) -> None:
    with TokenStore(tmp_path / "cache", rows, renderer, np.arange(COUNT)[::-1]) as store:
        for row in (0, 7, COUNT - 1):
            expected = renderer.render(rows[row])
            ids, target = store.example(row)
            assert ids.tolist() == expected.ids.tolist()
            assert target.tolist() == expected.target.tolist()
            assert store.lengths(np.array([row])).tolist() == [len(expected.ids)]
            assert store.record_id(row) == rows[row].id
            assert store.source(row) == rows[row].source == f"s{row % 3}"


def test_another_reader_is_served_while_the_writer_works(
    tmp_path: Path, rows: Rows, renderer: Renderer
) -> None:
    order = np.random.default_rng(0).permutation(COUNT)
    reader = TokenStore(tmp_path / "cache", rows, renderer, order, writer=False)
    found: list[np.ndarray] = []
    waiting = threading.Thread(target=lambda: found.append(reader.lengths(order[:50])))
    waiting.start()
    with TokenStore(tmp_path / "cache", rows, renderer, order) as writer:
        waiting.join(timeout=30)
        assert found[0].tolist() == writer.lengths(order[:50]).tolist()
        finish(reader)
    assert reader.seen == writer.seen and reader.seen.rows == COUNT


def test_the_rows_of_the_first_window_come_first(
    tmp_path: Path, rows: Rows, renderer: Renderer
) -> None:
    order = np.random.default_rng(0).permutation(COUNT)
    with TokenStore(tmp_path / "cache", rows, renderer, order) as store:
        finish(store)
    first = tokens.shards.read(min(store.folder.glob("*.arrow")))
    assert first is not None and first.rows.tolist() == order[:64].tolist()


def test_a_finished_cache_is_read_and_not_written_again(
    tmp_path: Path, rows: Rows, renderer: Renderer, make_tokenizer: Maker
) -> None:
    with TokenStore(tmp_path / "cache", rows, renderer, np.arange(COUNT)) as store:
        finish(store)
    before = shard_files(store)
    again = Renderer(make_tokenizer())
    with TokenStore(tmp_path / "cache", rows, again, np.arange(COUNT)[::-1]) as store:
        finish(store)
    assert shard_files(store) == before and len(before) > 3


def test_a_second_run_tokenises_nothing(
    tmp_path: Path, rows: Rows, make_tokenizer: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenised: list[int] = []
    code = Renderer.render_many

    def counted(renderer: Renderer, records: Any, places: Any) -> Any:
        tokenised.append(len(records))
        return code(renderer, records, places)

    monkeypatch.setattr(Renderer, "render_many", counted)
    for run_of in (COUNT, 0):
        tokenised.clear()
        with TokenStore(
            tmp_path / "cache", rows, Renderer(make_tokenizer()), np.arange(COUNT)
        ) as store:
            finish(store)
        assert sum(tokenised) == run_of


def test_other_options_or_rows_use_another_cache(
    tmp_path: Path, rows: Rows, make_tokenizer: Maker
) -> None:
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    other = open_rows(tmp_path / "b.jsonl")
    tokenizer = make_tokenizer()
    stores = [
        TokenStore(tmp_path, source, Renderer(tokenizer, **options), np.arange(1), writer=False)
        for source, options in [
            (rows, {}), (other, {}), (rows, {"max_length": 9}),
            (rows, {"max_length": 9, "over_length": "truncate"}),
        ]
    ]  # fmt: skip
    assert len({store.folder for store in stores}) == 4


KILLED = """
import sys, time, numpy as np
from pathlib import Path
from tuneloom.data.render import Renderer
from tuneloom.data.rows import open_rows
from tuneloom.data.tokenizer import load_tokenizer
from tuneloom.data.tokens import TokenStore
folder = Path(sys.argv[1])
rows = open_rows(folder / "rows.jsonl")
renderer = Renderer(load_tokenizer(str(folder / "tok")))
store = TokenStore(folder / "cache", rows, renderer, np.arange(len(rows)))
store.lengths(np.arange(64))
print("started", flush=True)
time.sleep(60)
"""


def test_a_killed_writers_shards_are_taken_up(
    tmp_path: Path, rows: Rows, make_tokenizer: Maker
) -> None:
    make_tokenizer().save_pretrained(tmp_path / "tok")
    from tuneloom.data.tokenizer import load_tokenizer

    renderer = Renderer(load_tokenizer(str(tmp_path / "tok")))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.kill()
    process.wait()
    folder = next((tmp_path / "cache").iterdir())
    (folder / "000099-half.arrow.1.tmp").write_bytes(b"half a shard")
    left = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    with TokenStore(tmp_path / "cache", rows, renderer, np.arange(COUNT)) as store:
        finish(store)
        ids, _ = store.example(COUNT - 1)
    assert ids.tolist() == renderer.render(rows[COUNT - 1]).ids.tolist()
    assert left.items() <= shard_files(store).items() and left
    assert not list(folder.glob("*.tmp"))


def test_a_damaged_shard_is_found_and_written_again(
    tmp_path: Path, rows: Rows, renderer: Renderer
) -> None:
    with TokenStore(tmp_path / "cache", rows, renderer, np.arange(COUNT)) as store:
        finish(store)
    damaged = sorted(store.folder.glob("*.arrow"))[1]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    with TokenStore(tmp_path / "cache", rows, renderer, np.arange(COUNT)) as store:
        for row in range(0, COUNT, 50):
            assert store.example(row)[0].tolist() == renderer.render(rows[row]).ids.tolist()


def test_every_rank_raises_what_the_writer_found_and_the_next_start_forgets_it(
    tmp_path: Path, make_tokenizer: Maker
) -> None:
    file = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    file.write_text(good * 100 + "{broken\n")
    rows, renderer = open_rows(file), Renderer(make_tokenizer())
    order = np.arange(101)
    with TokenStore(tmp_path / "cache", rows, renderer, order) as writer:
        reader = TokenStore(tmp_path / "cache", rows, renderer, order, writer=False)
        for store in (writer, reader):
            with pytest.raises(DataError, match=r"rows.jsonl:101: broken JSON"):
                store.lengths(order)
    with TokenStore(tmp_path / "cache", rows, renderer, order[:100]) as writer:
        reader = TokenStore(tmp_path / "cache", rows, renderer, order[:100], writer=False)
        assert reader.lengths(order[:100]).all()


def test_a_row_that_cannot_be_rendered_is_named_by_its_line(
    tmp_path: Path, make_tokenizer: Maker
) -> None:
    file = tmp_path / "rows.jsonl"
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    bad = {"messages": [{"role": "user", "content": "no answer here"}]}
    file.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    with (
        TokenStore(tmp_path / "c", open_rows(file), Renderer(make_tokenizer()), np.arange(2)) as s,
        pytest.raises(DataError, match=r"rows.jsonl:2: no token to train on"),
    ):
        s.lengths(np.arange(2))


@pytest.mark.parametrize("over_length", ["drop", "truncate"])
def test_too_many_lost_answer_tokens_stop_the_run_with_both_numbers(
    tmp_path: Path, rows: Rows, make_tokenizer: Maker, over_length: str
) -> None:
    renderer = Renderer(make_tokenizer(), max_length=LIMIT, over_length=over_length)
    order = np.arange(COUNT)
    lost = r"at most 0.50% of answer tokens may be lost, but \d+\.\d+% \([\d,]+ of [\d,]+ in the"
    with TokenStore(
        tmp_path / "c", rows, renderer, order, max_lost_answer_tokens=0.005
    ) as store, pytest.raises(DataError, match=lost):  # fmt: skip
        finish(store)
    with TokenStore(tmp_path / "c", rows, renderer, order) as store:
        finish(store)
        assert 0.005 < store.seen.lost / store.seen.targets < 0.9
    with TokenStore(
        tmp_path / "c", rows, renderer, order, max_lost_answer_tokens=0.005
    ) as store, pytest.raises(DataError, match=lost):  # fmt: skip
        finish(store)  # the whole cache is there, and the limit holds all the same


def test_a_cache_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, rows: Rows, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = None
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        store = TokenStore(tmp_path / "c", rows, renderer, np.arange(COUNT))
        with pytest.raises(DataError, match=r"token cache cannot be written \(File too large\)"):
            finish(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert store is not None
        store.close()
    assert not list(store.folder.glob("*.arrow"))


def test_two_runs_share_one_cache_and_write_each_row_once(
    tmp_path: Path, rows: Rows, renderer: Renderer
) -> None:
    order = np.arange(COUNT)
    with (
        TokenStore(tmp_path / "c", rows, renderer, order) as first,
        TokenStore(tmp_path / "c", rows, renderer, order[::-1]) as second,
    ):
        finish(second)
        finish(first)
    written = [tokens.shards.read(path) for path in first.folder.glob("*.arrow")]
    held = np.concatenate([shard.rows for shard in written if shard is not None])
    assert sorted(held.tolist()) == order.tolist()


def test_a_run_gets_its_rows_while_one_that_wanted_fewer_is_still_open(
    tmp_path: Path, rows: Rows, renderer: Renderer
) -> None:
    order = np.arange(COUNT)
    with TokenStore(tmp_path / "c", rows, renderer, order[:70]) as first:
        first.lengths(order[:70])
        with TokenStore(tmp_path / "c", rows, renderer, order) as second:
            found: list[np.ndarray] = []
            waiting = threading.Thread(
                target=lambda: found.append(second.lengths(order)), daemon=True
            )
            waiting.start()
            waiting.join(timeout=30)
            assert found and found[0].all()


def test_an_error_of_an_earlier_writer_does_not_end_readers_of_the_next(
    tmp_path: Path, rows: Rows, renderer: Renderer
) -> None:
    order = np.arange(COUNT)
    reader = TokenStore(tmp_path / "c", rows, renderer, order, writer=False)
    reader.folder.mkdir(parents=True)
    with (reader.folder / "lock").open("w") as earlier:
        fcntl.flock(earlier, fcntl.LOCK_EX)
        with TokenStore(tmp_path / "c", rows, renderer, order) as next_writer:
            (reader.folder / "error.json").write_text('{"data": true, "message": "of before"}')
            fcntl.flock(earlier, fcntl.LOCK_UN)
            finish(next_writer)
            assert reader.lengths(order).all()


def test_a_paced_writer_waits_to_be_asked_until_it_is_told_to_hurry(
    tmp_path: Path, rows: Rows, renderer: Renderer
) -> None:
    with TokenStore(tmp_path / "cache", rows, renderer, np.arange(COUNT), paced=True) as store:
        store.lengths(np.arange(100))
        deadline = time.monotonic() + 30
        while store.seen.rows < tokens.AHEAD_ROWS and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        first = store.seen.rows
        assert tokens.AHEAD_ROWS <= first < COUNT
        store.lengths(np.array([first]))
        assert first < store.seen.rows
        store.hurry()
        deadline = time.monotonic() + 30
        while store.seen.rows < COUNT and time.monotonic() < deadline:
            time.sleep(0.02)
        assert store.seen.rows == COUNT


def test_a_paced_writer_goes_on_by_itself_after_a_while(
    tmp_path: Path, rows: Rows, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "PATIENCE_SECONDS", 0.6)
    started = time.monotonic()
    with TokenStore(tmp_path / "cache", rows, renderer, np.arange(COUNT), paced=True) as store:
        while store.seen.rows < COUNT and time.monotonic() < started + 30:
            time.sleep(0.02)
        assert store.seen.rows == COUNT and time.monotonic() - started > 0.6


def test_closing_stops_the_writer_and_keeps_what_it_wrote(
    tmp_path: Path, rows: Rows, renderer: Renderer
) -> None:
    store = TokenStore(tmp_path / "c", rows, renderer, np.arange(COUNT))
    store.lengths(np.arange(1))
    store.close()
    assert not any(thread.name == "tokenise" for thread in threading.enumerate())
    assert list(store.folder.glob("*.arrow")) and not list(store.folder.glob("*.tmp"))


def test_the_ledger_adds_up_to_the_token(tmp_path: Path, rows: Rows, make_tokenizer: Maker) -> None:
    whole = Renderer(make_tokenizer())
    expected = whole.render_many([rows[i] for i in range(COUNT)])
    for over_length in ("drop", "truncate"):
        renderer = Renderer(make_tokenizer(), max_length=LIMIT, over_length=over_length)
        ledger = Ledger()
        with TokenStore(tmp_path / "c", rows, renderer, np.arange(COUNT)) as store:
            lengths = store.lengths(np.arange(COUNT))
            ledger.count(np.flatnonzero(lengths > 0), store, padded=11)
            ledger.count(np.flatnonzero(lengths == 0), store)
        total = ledger.total
        trained = sum(
            int(
                e.target[
                    : None if e.tokens <= LIMIT else LIMIT if over_length == "truncate" else 0
                ].sum()
            )
            for e in expected
        )
        ledger.check(rows=COUNT, trained=trained)
        assert set(ledger.accounts) == {"s0", "s1", "s2"}
        assert total.tokens == sum(e.tokens for e in expected)
        over = sum(e.tokens > LIMIT for e in expected)
        assert over and ledger.padded == 11
        if over_length == "drop":
            assert total.dropped == {"over_length": over} and total.truncated == 0
        else:
            assert total.dropped == {} and total.truncated == sum(
                max(0, e.tokens - LIMIT) for e in expected
            )
        again = Ledger()
        again.restore(json.loads(json.dumps(ledger.state())))
        assert again.state() == ledger.state()
        ledger.write(tmp_path / "ledger.json")
        written = json.loads((tmp_path / "ledger.json").read_text())
        assert written["total"]["trained"] == trained and written["padded"] == 11
        kept = {name: a["trained"] + a["masked"] for name, a in written["sources"].items()}
        for name, share in written["shares"].items():
            assert share["tokens"] == round(kept[name] / sum(kept.values()), 6)
            assert share["rows"] == round(written["sources"][name]["used"] / total.used, 6)


@pytest.mark.parametrize("packing", [True, False])
def test_the_ledger_agrees_with_the_plan_after_every_step(
    tmp_path: Path, rows: Rows, make_tokenizer: Maker, packing: bool
) -> None:
    ledger, renderer = Ledger(), Renderer(make_tokenizer(), max_length=LIMIT)
    config = PlanConfig(
        seed=1, epochs=1.3, shuffle=True, packing=packing, tokens=256, sequences=4, window=300,
        balance=True,
        group=4,
    )  # fmt: skip
    with TokenStore(tmp_path / "c", rows, renderer, epoch_order(COUNT, 1, 0)) as store:
        plan, steps = Plan(COUNT, store.lengths, config), 0
        while bins := plan.next_step():
            ledger.count(np.concatenate(bins), store)
            ledger.count(plan.dropped, store)
            ledger.check(rows=plan.consumed)
            steps += 1
        ledger.count(plan.dropped, store)
    assert steps > 20 and ledger.total.rows == round(1.3 * COUNT) == plan.consumed
    ledger.check(rows=plan.consumed)


def test_a_ledger_that_does_not_add_up_says_so(
    tmp_path: Path, rows: Rows, renderer: Renderer
) -> None:
    ledger = Ledger()
    with TokenStore(tmp_path / "c", rows, renderer, np.arange(COUNT)) as store:
        ledger.count(np.arange(5), store)
    with pytest.raises(AssertionError):
        ledger.check(rows=6)
    ledger.accounts["s0"].masked += 1
    with pytest.raises(AssertionError):
        ledger.check()
