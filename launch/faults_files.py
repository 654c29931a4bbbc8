"""Files in wrong shapes: F8 strikes the control files of a run, F9 the rows that it is to read."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tuneloom.errors import DATA, DONE, STOPPED, Stopped, TuneloomError
from tuneloom.launch.drill_lab import EVERY, Figures, Lab, Run, exposed
from tuneloom.testing import Gang, small_config
from tuneloom.train import checkpoint

STEPS = 3 * EVERY
TURNS = 5
"""Of every file in every shape, so that the drill strikes 200 times."""
GONE = b"step-999999"
CONTROL_FILES = {
    "the manifest": "checkpoints/{newest}/MANIFEST.json", "latest": "latest",
    "run.json": "run.json", "trainer.json": "checkpoints/{newest}/trainer.json",
    "metrics.jsonl": "metrics.jsonl",
}  # fmt: skip
SHAPES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda data, rng: b"",
    "cut off": lambda data, rng: data[: rng.randrange(1, len(data))],
    "NULs": lambda data, rng: bytes(rng.randrange(1, 2 * len(data))),
    "another version": lambda data, rng: b'{"version": 99, "what": "none of ours"}\n',
    "another type": lambda data, rng: rng.choice((b"[]", b"8", b'"text"', b"null", b"[[1]]")),
    "huge": lambda data, rng: b'{"files": "' + b"x" * rng.randrange(1 << 20, 4 << 20) + b'"}',
    "not UTF-8": lambda data, rng: b"\xff\xfe" + rng.randbytes(len(data)),
    "a stale path": lambda data, rng: GONE,
}
Losses = dict[int, float]


def control_files(lab: Lab, rng: random.Random) -> list[Figures]:
    """F8: a run that stopped with two checkpoints; one of its files is put into a wrong shape, and
    the same command goes on. Ranks are processes that train one config after another.
    """
    gang = Gang(2)
    try:
        gang.fit(_config(lab, "f8-whole"))
        whole = lab.folder / "runs/f8-whole"
        wanted = _losses(whole)
        run, kept = lab.folder / "runs/f8", lab.folder / "f8-kept"
        stopped = _stopped(gang, _config(lab, "f8"), run)
        shutil.copytree(run, kept)
        good: Counter[str] = Counter()
        lost = bits = samples = 0
        for file, shape in [(f, s) for _ in range(TURNS) for f in CONTROL_FILES for s in SHAPES]:
            shutil.rmtree(run)
            shutil.copytree(kept, run)
            path = run / CONTROL_FILES[file].format(newest=checkpoint.name(stopped))
            path.write_bytes(SHAPES[shape](path.read_bytes(), rng))
            fault, resumed = _goes_on(gang, _config(lab, "f8"), run)
            found = {step: loss for step, loss in _losses(run).items() if step > resumed}
            off = sum(found.get(step) != loss for step, loss in wanted.items() if step > resumed)
            astray = _astray(run, whole)
            good[file] += fault is None and not off and not astray
            if fault or off or astray:
                print(f"drill: {file}, {shape}: {fault}, {off} losses off", flush=True)
            lost, bits = max(lost, stopped - resumed), bits + off
            samples += astray
    finally:
        gang.close()
    each = TURNS * len(SHAPES)
    counts = ", ".join(f"{file} {good[file]} of {each}" for file in CONTROL_FILES)
    what = (f"control files {', '.join(SHAPES)}; then the same command: right resumes "
            f"{counts}; bits are losses, lost is the most of one")  # fmt: skip
    held = good.total() == each * len(CONTROL_FILES) and lost <= 2 * EVERY - 1
    return [Figures("F8", what, f"{STOPPED}, {DONE}", lost, None, bits, samples, 0, held)]


def _config(lab: Lab, run_id: str) -> dict[str, object]:
    return small_config(lab.folder, run_id, steps=STEPS, zero__stage=2, checkpoint__every=EVERY)


def _stopped(gang: Gang, config: dict[str, object], run: Path) -> int:
    """Stop a run between its second and its last checkpoint; returns the step that it saved."""
    for pipe in gang.pipes:
        pipe.send(config)
    rows = run / "metrics.jsonl"
    while not (rows.exists() and len(rows.read_text().splitlines()) > 2 * EVERY):
        time.sleep(0.001)
    (run / "stop").touch()
    ends = [pipe.recv() for pipe in gang.pipes]
    assert all(isinstance(end, Stopped) for end in ends), ends
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None and len(checkpoint.ordered(run / "checkpoints")) >= 2, found
    return found.step


def _goes_on(gang: Gang, config: dict[str, object], run: Path) -> tuple[str | None, int]:
    """The same command; what was wrong, None when nothing, and the step that it went on from."""
    try:
        gang.fit(config)
    except (TuneloomError, AssertionError) as error:
        return f"ended with {error}", 0
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    resumed = int((facts["resumed_from"] or "step-0").removeprefix("step-"))
    return (None if facts["state"] == "done" and resumed else f"began at {resumed}"), resumed


def _losses(run: Path) -> Losses:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def _astray(run: Path, whole: Path) -> int:
    """Examples missing or twice."""
    ours, wanted = (exposed(folder / "exposure.parquet") for folder in (run, whole))
    return (ours - wanted).total() + (wanted - ours).total()


BAD_ROWS: list[tuple[str, bytes]] = [
    ("invalid_utf8", b'{"text": "caf\xe9"}'), ("invalid_json", b'{"text": "cut off'),
    ("lone_surrogate", b'{"text": "half \\ud800 a pair"}'),
    ("duplicate_key", b'{"text": "one", "text": "two"}'),
    ("unknown_shape", b'{"title": "another schema"}'), ("wrong_type", b'{"messages": 7}'),
    ("not_an_object", b'["text"]'), ("not_finite", b'{"text": "a", "score": NaN}'),
    ("empty", b'{"text": "\\u0000\\u0000"}'),
    ("too_long", b'{"text": "' + b"x" * 10_000_000 + b'"}'),
]  # fmt: skip
"""The shapes that are no records, with the reason that must be given."""
DIRT = ("\x00", "\u202e", "\u200b", "\ufeff")
"""NUL, bidi override, zero width, byte order mark: taken out of a row that is then a good one."""


def bad_rows(lab: Lab, rng: random.Random) -> list[Figures]:
    """F9: bad and dirty rows among those of a run: rejected by line and reason, or cleaned, and
    trained on as the clean ones are; more of them than the budget, or rows that were not ingested,
    are refused.
    """
    clean = (lab.folder / "rows.jsonl").read_bytes().splitlines()
    mixed, planted = _planted(clean, rng)
    (lab.folder / "dirty.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(mixed) + b"\n")
    budget = f"data.max_rejected={len(BAD_ROWS) / len(mixed) + 1e-6:.6f}"
    codes = [
        _ingested(lab, "clean", "rows.jsonl"), _ingested(lab, "dirty", "dirty.jsonl"),
        _ingested(lab, "dirty", "dirty.jsonl", budget),
    ]  # fmt: skip
    folder = lab.folder / "sets/dirty"
    with (folder / "rejected.jsonl").open(encoding="utf-8") as file:
        rejects = [json.loads(line) for line in file]
    found = {(reject["line"], reject["reason"]) for reject in rejects}
    sources = {"clean": "sets/clean", "rest": "sets/dirty", "raw": "dirty.jsonl"}
    runs = {}
    for name, path in sources.items():
        runs[name] = Run(lab, f"f9-{name}", f"data.path={lab.folder}/{path}", f"steps={STEPS}")
        codes.append(runs[name].end())
    ours, wanted = (_losses(runs[name].folder) for name in ("rest", "clean"))
    off = sum(ours.get(step) != loss for step, loss in wanted.items())
    astray = _astray(runs["rest"].folder, runs["clean"].folder)
    named = f"{lab.folder}/dirty.jsonl:" in runs["raw"].log.read_text(errors="replace")
    exact = found == planted and len(rejects) == len(planted)
    what = (
        f"{len(BAD_ROWS)} rows that are none and {len(DIRT)} dirty ones among {len(clean)}: "
        f"{len(found & planted)} rejected by line and reason, {len(found - planted)} others; then "
        "a run on the rest, losses against one on clean rows; over the budget, and raw: refused"
    )
    held = exact and named and not off and not astray
    held = held and codes == [DONE, DATA, DONE, DONE, DONE, DATA]
    return [Figures("F9", what, ", ".join(map(str, codes)), None, None, off, astray,
                    lab.orphans(), held)]  # fmt: skip


def _planted(clean: list[bytes], rng: random.Random) -> tuple[list[bytes], set[tuple[int, str]]]:
    """Clean rows, some of them dirty, bad ones between; and line and reason of the bad ones."""
    rows: list[tuple[str | None, bytes]] = [(None, row) for row in clean]
    for dirt, at in zip(DIRT, rng.sample(range(len(rows)), len(DIRT)), strict=True):
        obj = json.loads(rows[at][1])
        answer = obj["messages"][-1]
        answer["content"] = answer["content"].replace("answer", f"ans{dirt}wer", 1)
        rows[at] = None, json.dumps(obj).encode()
    for bad in BAD_ROWS:
        rows.insert(rng.randrange(len(rows) + 1), bad)
    lines = {(number, why) for number, (why, _) in enumerate(rows, 1) if why is not None}
    return [row for _, row in rows], lines


def _ingested(lab: Lab, name: str, source: str, *more: str) -> int:
    """`tuneloom ingest`, all into the training split; its exit code."""
    command = [
        sys.executable, "-m", "tuneloom", "ingest", f"data.name={name}",
        f"source={lab.folder}/{source}", f"root={lab.folder}/sets",
        "data.split={train: 1.0, validation: 0.0, test: 0.0}", *more,
    ]  # fmt: skip
    with (lab.folder / f"ingest-{name}.log").open("ab") as log:
        return subprocess.run(command, stdout=log, stderr=log, cwd=lab.folder).returncode


FAULTS: dict[str, Callable[[Lab, random.Random], Iterable[Figures]]] = {
    "F8": control_files, "F9": bad_rows,
}  # fmt: skip
