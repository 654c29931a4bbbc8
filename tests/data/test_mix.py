"""Mixtures: the shares that were asked for, nothing of any test split, a way back to the parts."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tuneloom.config import build, compose
from tuneloom.data.erase import EraseConfig, execute, make_plan
from tuneloom.data.ingest import ingest
from tuneloom.data.mix import MixConfig, main, mix
from tuneloom.data.recipe import IngestConfig
from tuneloom.data.render import Renderer
from tuneloom.data.rows import open_rows
from tuneloom.errors import ConfigError, DataError
from tuneloom.registry.graph import Graph


def make(tmp_path: Path, name: str, count: int, **data: Any) -> str:
    raw = tmp_path / f"{name}.jsonl"
    raw.write_text(
        "".join(json.dumps({"text": f"{name} row {i}", "n": i}) + "\n" for i in range(count))
    )
    mapping = {"data": {"name": name, "key": f"{name} {{n}}", **data}, "source": str(raw)}
    return str(ingest(build(IngestConfig, mapping | {"root": str(tmp_path / "datasets")})))


@pytest.fixture
def parts(tmp_path: Path) -> list[str]:
    return [make(tmp_path, "big", 1000), make(tmp_path, "small", 100)]


def mixed(tmp_path: Path, **config: Any) -> tuple[Path, dict[str, Any], Counter[str]]:
    folder = mix(build(MixConfig, {"name": "m", "root": str(tmp_path / "datasets"), **config}))
    manifest = json.loads((folder / "manifest.json").read_text())
    return folder, manifest, Counter(row["source"].split("/")[0] for row in rows(folder, "train"))


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return list(pq.read_table(folder / f"{split}-00000.parquet").to_pylist())


def of(parts: list[str], **each: list[float]) -> list[dict[str, Any]]:
    return [
        {"dataset": p} | {key: values[i] for key, values in each.items()}
        for i, p in enumerate(parts)
    ]


def sizes(parts: list[str]) -> list[int]:
    return [len(open_rows(p)) for p in parts]


def test_weights_are_shares_of_the_rows(tmp_path: Path, parts: list[str]) -> None:
    _, manifest, counted = mixed(tmp_path, parts=of(parts, weight=[3, 1]), rows=400)
    assert counted == {"big": 300, "small": 100}
    assert [part["share"] for part in manifest["mixture"]] == [0.75, 0.25]
    small = manifest["mixture"][1]
    assert small["epochs"] == pytest.approx(100 / sizes(parts)[1], abs=1e-6)


def test_shares_of_tokens_are_those_of_a_tokenizer_that_is_named(
    tmp_path: Path,
    parts: list[str],
    make_tokenizer: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw = tmp_path / "chats.jsonl"
    row = {"prompt": "a long question " * 9, "completion": "yes"}
    raw.write_text("".join(json.dumps(row | {"prompt": f"{row['prompt']}{i}"}) + "\n"
                           for i in range(50)))  # fmt: skip
    recipe = {"data": {"name": "chats"}, "source": str(raw), "root": str(tmp_path / "datasets")}
    parts.append(str(ingest(build(IngestConfig, recipe))))
    tokenizer = make_tokenizer("chatml")
    tokenizer.save_pretrained(tmp_path / "tok")
    listed = ",".join(f"{{dataset: {p}, epochs: {1 + i}}}" for i, p in enumerate(parts))
    words = [f"parts=[{listed}]", "name=m", f"root={tmp_path / 'datasets'}"]

    assert main(build(MixConfig, compose("mix", words))) == 0
    without = capsys.readouterr().out
    assert "tokens: not counted" in without and "ledger.json" in without
    assert main(build(MixConfig, compose("mix", [*words, f"model.path={tmp_path / 'tok'}"]))) == 0
    said = capsys.readouterr().out
    assert said.split("m@")[1].split()[0] == without.split("m@")[1].split()[0]

    expected = Counter[str]()
    rows = open_rows(tmp_path / "datasets" / "m")
    for i in range(len(rows)):
        renderer = Renderer(tokenizer, "pretrain" if rows[i].kind == "text" else "sft")
        expected[rows.source(i).split("/")[0]] += renderer.render(rows[i]).tokens
    lines = [line.split() for line in said.splitlines() if " tokens " in line]
    assert {name: int(n.replace(",", "")) for name, n, *_ in lines} == expected
    shares = [f"{n / expected.total():.2%}" for _, n in sorted(expected.items())]
    assert [line[-1] for line in lines] == shares


def test_pairs_of_answers_are_said_to_be_uncounted(
    tmp_path: Path,
    parts: list[str],
    make_tokenizer: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    raw = tmp_path / "pairs.jsonl"
    raw.write_text(json.dumps(pair) + "\n")
    recipe = {"data": {"name": "pairs", "split": {"train": 1.0, "validation": 0.0, "test": 0.0}},
              "source": str(raw), "root": str(tmp_path / "datasets")}  # fmt: skip
    parts = [parts[0], str(ingest(build(IngestConfig, recipe)))]
    make_tokenizer("chatml").save_pretrained(tmp_path / "tok")
    config = {"name": "m", "parts": [{"dataset": p, "epochs": 1} for p in parts],
              "root": str(tmp_path / "datasets"),
              "model": {"path": str(tmp_path / "tok")}}  # fmt: skip
    assert main(build(MixConfig, config)) == 0
    assert "1 pairs of answers are not counted" in capsys.readouterr().out


def test_epochs_repeat_each_row_so_often(tmp_path: Path, parts: list[str]) -> None:
    folder, _, counted = mixed(tmp_path, parts=of(parts, epochs=[0.5, 3.0]))
    big, small = sizes(parts)
    assert counted == {"big": round(big * 0.5), "small": 3 * small}
    times = Counter(row["id"] for row in rows(folder, "train") if row["source"].startswith("small"))
    assert set(times.values()) == {3}


def test_temperature_lifts_the_small_part(tmp_path: Path, parts: list[str]) -> None:
    plain = mixed(tmp_path, parts=of(parts))[2]
    lifted = mixed(tmp_path, parts=of(parts), temperature=3.0)[2]
    assert plain == dict(zip(["big", "small"], sizes(parts), strict=True))
    assert lifted.total() == plain.total()
    big, small = (size ** (1 / 3) for size in sizes(parts))
    assert lifted["small"] == pytest.approx(plain.total() * small / (big + small), abs=1)


def test_rehearsal_is_its_share_of_the_whole(tmp_path: Path, parts: list[str]) -> None:
    rehearsal = {"dataset": parts[1], "share": 0.2}
    _, _, counted = mixed(tmp_path, parts=of(parts[:1]), rehearsal=rehearsal)
    assert counted["small"] / counted.total() == pytest.approx(0.2, abs=0.001)


def test_no_row_that_a_part_tests_on_is_trained_on(tmp_path: Path) -> None:
    first = make(tmp_path, "one", 500, key="{n}")
    other = make(tmp_path, "two", 500, key="{n}", split={"seed": 9})
    folder, manifest, _ = mixed(tmp_path, parts=of([first, other]))
    held = {
        json.loads(row["meta"])["key"] for s in ("validation", "test") for row in rows(folder, s)
    }
    assert not held & {json.loads(row["meta"])["key"] for row in rows(folder, "train")}
    assert sum(part["held_out"] for part in manifest["mixture"]) > 50


def test_a_mixture_is_the_same_again_and_larger_ones_hold_it(
    tmp_path: Path, parts: list[str]
) -> None:
    one, _, _ = mixed(tmp_path, parts=of(parts, weight=[1, 1]), rows=60)
    two, _, _ = mixed(tmp_path, parts=of(parts, weight=[1, 1]), rows=60)
    more, _, _ = mixed(tmp_path, parts=of(parts, weight=[1, 1]), rows=120)
    assert one == two != more
    assert {r["id"] for r in rows(one, "train")} < {r["id"] for r in rows(more, "train")}
    assert len(open_rows(one)) == 60


def test_contradicting_shares_are_refused(parts: list[str]) -> None:
    with pytest.raises(ConfigError, match="two ways to say one thing"):
        build(MixConfig, {"name": "m", "parts": of(parts, weight=[1, 1], epochs=[1, 1])})
    with pytest.raises(ConfigError, match="temperature: shares parts that have no weight"):
        build(MixConfig, {"name": "m", "parts": of(parts, weight=[1.0, 2.0]), "temperature": 3.0})
    with pytest.raises(ConfigError, match="a weight to every part or to none"):
        build(MixConfig, {"name": "m", "parts": [{"dataset": "a", "weight": 1}, {"dataset": "b"}]})


def test_more_rows_than_any_disk_holds_are_refused_before_a_row_is_written(
    tmp_path: Path, parts: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"parts: 1,\d+,\d+,\d+,\d+ rows in all; at most"):
        mixed(tmp_path, parts=of(parts, epochs=[1e9, 1e12 / 100]))
    assert not list((tmp_path / "datasets").glob(".draft-*"))


def test_epochs_that_take_no_row_are_refused(tmp_path: Path, parts: list[str]) -> None:
    with pytest.raises(ConfigError, match="parts: no row is taken; raise epochs"):
        mixed(tmp_path, parts=of(parts, epochs=[0.0001, 0.0001]))


@pytest.mark.parametrize("root", ["file", "file/below", "/proc/none"])
def test_a_root_that_cannot_be_written_is_named(
    tmp_path: Path, parts: list[str], root: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"root: .*{root} cannot be written"):
        mixed(tmp_path, parts=of(parts), root=str(tmp_path / root))


def test_a_part_with_no_row_left_is_named(tmp_path: Path) -> None:
    part = make(tmp_path, "one", 50, key="{n}", split={"train": 1, "validation": 0, "test": 0})
    held = make(tmp_path, "two", 50, key="{n}", split={"train": 0, "validation": 0, "test": 1})
    with pytest.raises(DataError, match=r"one@[0-9a-f]+ has no train rows that no part holds out"):
        mixed(tmp_path, parts=of([part, held]))


def test_a_mixture_keeps_the_licence_of_each_row(tmp_path: Path, parts: list[str]) -> None:
    terms = [{"match": "*", "licence": "MIT"}]
    free = make(tmp_path, "free", 50, provenance=terms)
    mixed(tmp_path, parts=of([free, parts[1]]))
    graph = Graph.load(tmp_path / "datasets", tmp_path)
    found = graph.find_rows("licence", "MIT")
    (mixture,) = (t for name, t in found.items() if name.startswith("m@"))
    assert set(mixture["source"].to_pylist()) == {"free/free.jsonl"}
    assert set(graph.find_rows("source", "free.jsonl")) == set(found)


def test_an_erased_source_leaves_the_mixture_too(tmp_path: Path, parts: list[str]) -> None:
    mixed(tmp_path, parts=of(parts))
    order = {"source": "small.jsonl", "execute": True, "reason": "r"}
    places = {"datasets": str(tmp_path / "datasets"), "runs": str(tmp_path)}
    config = build(EraseConfig, order | places)
    graph = Graph.load(tmp_path / "datasets", tmp_path)
    list(execute(graph, make_plan(graph, config), config))
    after = {
        d.manifest["name"]: d for d in Graph.load(tmp_path / "datasets", tmp_path).datasets.values()
    }
    assert sorted(after) == ["big", "m", "small"]
    assert {row["source"] for _, t in after["m"].rows(["source"]) for row in t.to_pylist()} == {
        "big/big.jsonl"
    }
    assert after["m"].manifest["mixture"][1]["rows"] == 0
    assert set(after["m"].parents()) == {after["big"].name, after["small"].name}
