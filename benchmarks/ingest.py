"""Rows a second of `tuneloom ingest`, by what it is to do: python benchmarks/ingest.py [--rows N].

Rows are chats of about 1 KB, one in fifty an exact copy. `core` reads, validates, normalises,
deduplicates exactly, splits and writes; `near` adds MinHash; `privacy` adds secrets and personal
data. `rensa` is that library alone on the same texts, read, shingled, and compared with its own
index. The peers of benchmarks/peers/ run on the same files with the interpreters that `make bench`
puts into .peers/, or with `--datatrove PYTHON` and `--data-juicer PYTHON`. Peak memory is of all
processes, sampled twenty times a second. `core` and `near` run on `--scale` rows first (0: not).
Writes benchmarks/results/ingest.json.

`--memory N` runs `core` and `near` on N and on 4N rows of 182 bytes instead, each in a process of
its own, for what memory grows by: benchmarks/results/ingest_memory.json. N should be over a chunk
of tuneloom/data/scratch.py (262,144), up to which memory still fills.
"""

import argparse
import fileinput
import json
import multiprocessing
import os
import random
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import write
from tuneloom.config import build
from tuneloom.data.dedupe import PERMUTATIONS, SEED, shingles
from tuneloom.data.ingest import ingest
from tuneloom.data.quality import texts
from tuneloom.data.recipe import IngestConfig

PEERS = {"datatrove": "datatrove", "data_juicer": "py-data-juicer"}
"""And the packages that they are."""
CASES: dict[str, dict[str, Any]] = {
    "core": {"privacy": {"default": "keep", "secrets": "off"}},
    "near": {"privacy": {"default": "keep", "secrets": "off"}, "near": {"action": "drop"}},
    "privacy": {},
}


def write_rows(folder: Path, count: int, words_a_row: int = 140) -> None:
    """Two files of chats of words from a vocabulary of 5,000; every fiftieth row is a copy."""
    asked = 3 * words_a_row // 7
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randrange(2, 10))) for _ in range(5000)]
    folder.mkdir()
    with (folder / "a.jsonl").open("w") as one, (folder / "b.jsonl").open("w") as two:
        for i in range(count):
            if i % 50 != 49:
                question = f"{i} {' '.join(rng.choices(words, k=asked))}?"
                answer = " ".join(rng.choices(words, k=words_a_row - asked)) + "."
                turns = [("user", question), ("assistant", answer)]
                line = json.dumps({"messages": [{"role": r, "content": t} for r, t in turns]})
            (one if i < count // 2 else two).write(line + "\n")


class Peak:
    """The most that this process and its children held together while it was open, in MiB.

    `pss`: all pages, of which one that several share is counted once; `anonymous`: those that no
    file holds, and so the kernel cannot take back. The difference is mostly page cache.
    """

    def __enter__(self) -> "Peak":
        self.pss = self.anonymous = 0.0
        self.open = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.open:
            me = psutil.Process()
            held = [_held(p.pid) for p in (me, *me.children(recursive=True))]
            self.pss = max(self.pss, sum(pss for pss, _ in held))
            self.anonymous = max(self.anonymous, sum(anonymous for _, anonymous in held))
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self.open = False
        self.thread.join()


def _held(pid: int) -> tuple[float, float]:
    """Pss and Anonymous of a process by the kernel's account, in MiB; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0
    said = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return said["Pss"] / 1024, said["Anonymous"] / 1024


def run(source: Path, root: Path, workers: int, **data: Any) -> dict[str, Any]:
    """One ingest: seconds, rows a second, stages, peak memory, what was kept."""
    mapping = {
        "data": {"name": "b", **data},
        "source": str(source),
        "root": str(root),
        "workers": workers,
    }
    cpu, started = _cpu(), time.perf_counter()
    with Peak() as peak:
        folder = ingest(build(IngestConfig, mapping))
    seconds = time.perf_counter() - started
    manifest = json.loads((folder / "manifest.json").read_text())
    rows = manifest["counts"]["in"]
    return {
        "workers": workers, "seconds": round(seconds, 2), "rows_per_second": round(rows / seconds),
        "cpu_us_per_row": round((_cpu() - cpu) / rows * 1e6, 1), "peak_mib": round(peak.pss),
        "peak_anonymous_mib": round(peak.anonymous),
        "stages": json.loads((folder / "timing.json").read_text()), "id": manifest["id"],
        "kept": manifest["counts"]["kept"],
    }  # fmt: skip


def _cpu() -> float:
    """CPU seconds of this process and its ended children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def rensa_alone(source: Path) -> dict[str, Any]:
    """Read, shingle, sign and compare with rensa's own index, in this one process."""
    from rensa import RMinHash, RMinHashLSH

    cpu, started, rows = _cpu(), time.perf_counter(), 0
    index = RMinHashLSH(threshold=0.8, num_perm=PERMUTATIONS, num_bands=16)
    with fileinput.input(sorted(source.glob("*.jsonl")), encoding="utf-8") as lines:
        for rows, line in enumerate(lines, 1):
            sketch = RMinHash(num_perm=PERMUTATIONS, seed=SEED)
            sketch.update(shingles("\n".join(texts(json.loads(line))), 5))
            if not index.query(sketch):
                index.insert(rows, sketch)
    seconds = time.perf_counter() - started
    return {"workers": 1, "seconds": round(seconds, 2), "rows_per_second": round(rows / seconds),
            "cpu_us_per_row": round((_cpu() - cpu) / rows * 1e6, 1)}  # fmt: skip


def against(
    name: str, python: str, source: Path, folder: Path, before: dict[str, Any]
) -> dict[str, Any]:
    """A peer between two runs of ours, so that a machine that others use weighs on both alike."""
    peer = run_peer(name, python, source, folder / name)
    after = run(source, folder / f"after_{name}", 2, **CASES["core"])
    ours = (before["rows_per_second"] + after["rows_per_second"]) / 2
    result = {
        name: peer, f"core_after_{name}": after,
        f"core_times_{name}": round(ours / peer["rows_per_second"], 2),
    }  # fmt: skip
    print(result, flush=True)
    return result


def run_peer(name: str, python: str, source: Path, out: Path) -> dict[str, Any]:
    """A peer on the same files, in its own interpreter."""
    script = Path(__file__).parent / "peers" / f"{name}_ingest.py"
    out.mkdir()
    done = subprocess.run(
        [python, str(script), str(source), str(out)], capture_output=True, text=True, check=True,
        cwd=out,
    )  # fmt: skip
    said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    rows = sum(1 for path in source.glob("*.jsonl") for _ in path.open("rb"))
    version = f"import importlib.metadata as m; print(m.version('{PEERS[name]}'))"
    asked = subprocess.run([python, "-c", version], capture_output=True, text=True, check=True)
    return said | {
        "rows_per_second": round(rows / said["seconds"]), "version": asked.stdout.strip(),
    }  # fmt: skip


def memory(rows: int) -> None:
    """Peaks at `rows` and at four times as many, and bytes a row between them."""
    result: dict[str, Any] = {}
    for name in ("core", "near"):
        for count in (rows, 4 * rows):
            with tempfile.TemporaryDirectory() as folder:
                write_rows(Path(folder) / "raw", count, words_a_row=14)
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
                    made = own.submit(run, Path(folder) / "raw", Path(folder), 2, **CASES[name])
                    result[f"{name} {count}"] = made.result()
                print(name, count, result[f"{name} {count}"], flush=True)
        few, many = (result[f"{name} {n}"]["peak_anonymous_mib"] for n in (rows, 4 * rows))
        result[f"{name} bytes_a_row"] = round((many - few) * 2**20 / (3 * rows), 1)
        print(name, result[f"{name} bytes_a_row"], "bytes a row", flush=True)
    write("ingest_memory", result, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--scale", type=int, default=1_000_000)
    parser.add_argument("--memory", type=int, default=0)
    for name in PEERS:
        made = Path(f".peers/{name}/bin/python").absolute()
        parser.add_argument(
            f"--{name.replace('_', '-')}", help="an interpreter that has it",
            default=str(made) if made.exists() else None,
        )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.memory:
        return memory(arguments.memory)
    rows = arguments.rows
    result: dict[str, Any] = {"rows": rows, "load_before": os.getloadavg()[0]}
    if arguments.scale:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder) / "raw", arguments.scale)
            for key, name in (("scale", "core"), ("scale_near", "near")):
                result[key] = run(Path(folder) / "raw", Path(folder) / key, 2, **CASES[name])
                print(key, result[key], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "raw"
        write_rows(source, rows)
        result["bytes_per_row"] = round(sum(p.stat().st_size for p in source.iterdir()) / rows)
        for name, data in CASES.items():
            result[name] = run(source, Path(folder) / name, 2, **data)
            print(name, result[name], flush=True)
            if name == "core":
                for peer in PEERS:
                    if python := getattr(arguments, peer):
                        result |= against(peer, python, source, Path(folder), result[name])
        for name in ("core", "near"):  # one process, as rensa alone is
            alone = run(source, Path(folder) / f"{name}_one", 1, **CASES[name])
            assert alone["id"] == result[name]["id"], "workers must not show"
            result[f"{name}_one_worker"] = alone
        result["rensa"] = rensa_alone(source)
        print("rensa", result["rensa"], flush=True)
    near, core = (result[f"{name}_one_worker"]["cpu_us_per_row"] for name in ("near", "core"))
    added = near - core
    result["near_adds_times_rensa_cpu"] = round(added / result["rensa"]["cpu_us_per_row"], 2)
    result["load_after"] = os.getloadavg()[0]
    print(f"near-dedupe adds {result['near_adds_times_rensa_cpu']} x the CPU time of rensa alone")
    write("ingest", result, seed=0)


if __name__ == "__main__":
    main()
