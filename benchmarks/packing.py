"""B2: packing and balance, ours against TRL's best-fit-decreasing on the same lengths in one run.

    python -m benchmarks.packing

CPU seconds, because the machine may be shared: blocks of ours and TRL's alternate, the median of
three counts. TRL packs and moves the tokens in one function, so whole is compared with whole:
best-fit packing plus one array of the tokens in packed order, the second time in a process: the
first pays for fresh memory, which on a virtual machine costs ten times what the work does, or
nothing, as its host has it. Straggling is the slowest over the
mean of the ranks' costs, attention included, for the steps that `Plan` makes, against the same
bins dealt at random; LoRA on Llama-3-8B, and smaller models, whose attention weighs more.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import record
from tuneloom.data.balance import EVEN, costs_of, straggling
from tuneloom.data.packing import pack
from tuneloom.data.plan import Plan, PlanConfig

BUDGET = 4096
BLOCKS = 3
SEED = 0
CASES = {"alpaca": 100_000, "chat": 100_000, "mix": 100_000, "long": 50_000, "alpaca-1m": 1_000_000}
WHOLE_TOKENS = 200_000_000
"""Larger cases are planned but not materialised: two copies of the tokens may not fit."""
WORLDS = ((8, 32_768, 300_000), (64, 8_192, 300_000), (64, 32_768, 100_000),
          (64, 32_768, 300_000), (64, 131_072, 300_000), (512, 131_072, 3_000_000))  # fmt: skip
"""Ranks, tokens of a pack, rows of the dataset; windows as they are by default."""
SMALLER = {"Llama-3.2-1B": (1_235_814_400, 16, 2048), "Qwen3-0.6B": (596_049_920, 28, 2048)}
"""Parameters in products, layers, width of attention (heads by their size)."""

PEER = """
import sys, time
import numpy as np, pyarrow as pa
from trl.data_utils import _pack_bfd
lengths = np.load(sys.argv[1]); budget = int(sys.argv[2])
offsets = np.concatenate([[0], np.cumsum(lengths)])
values = pa.array(np.zeros(offsets[-1], np.int32))
table = pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), values)})
for _ in range(2):
    packed = None
    start = time.process_time()
    packed = _pack_bfd(table, budget)
print(time.process_time() - start, len(packed))
"""


def lengths_of(case: str, count: int) -> np.ndarray:
    """Synthetic lengths shaped like what people fine-tune on: (count,) int64."""
    generator = np.random.default_rng(SEED)
    if case.startswith("alpaca"):
        draws = generator.lognormal(4.6, 0.65, count)
    elif case == "chat":
        draws = generator.lognormal(6.6, 0.8, count)
    elif case == "mix":
        short = generator.random(count) < 0.7
        draws = np.where(
            short, generator.lognormal(5.2, 0.7, count), generator.lognormal(7.6, 0.6, count)
        )
    else:
        draws = generator.uniform(BUDGET * 0.26, BUDGET, count)
    return np.clip(draws, 16, BUDGET).astype(np.int64)


def materialise(bins: list[np.ndarray], lengths: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Tokens in packed order: (total,) int32."""
    order = np.concatenate(bins)
    stops = np.cumsum(lengths)
    places = zip((stops - lengths)[order].tolist(), stops[order].tolist(), strict=True)
    return np.concatenate([values[start:stop] for start, stop in places])


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(case: str, count: int, peer: str, scratch: str) -> dict[str, Any]:
    """One length distribution: CPU seconds and fill of both."""
    lengths = lengths_of(case, count)
    bins = pack(lengths, BUDGET)
    result: dict[str, Any] = {"rows": count, "ours": {"fill": _fill(lengths, len(bins))}}
    result["ours"]["plan_seconds"] = _median(
        [seconds(lambda: pack(lengths, BUDGET)) for _ in "123"]
    )
    total = int(lengths.sum())
    if total > WHOLE_TOKENS:
        return result
    values = np.zeros(total, np.int32)
    ours, theirs, packs = [], [], 0
    np.save(scratch, lengths)
    for _ in range(BLOCKS):
        spent = [seconds(lambda: materialise(pack(lengths, BUDGET), lengths, values)) for _ in "12"]
        ours.append(spent[1])
        command = [peer, "-c", PEER, scratch, str(BUDGET)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        packs = int(done.stdout.split()[-1])
        theirs.append(float(done.stdout.split()[-2]))
    result["ours"]["whole_seconds"] = _median(ours)
    result["trl"] = {"fill": _fill(lengths, packs), "whole_seconds": _median(theirs)}
    result["cpu_ratio_whole"] = _median(theirs) / _median(ours)
    result["whole_ranges"] = {"ours": [min(ours), max(ours)], "trl": [min(theirs), max(theirs)]}
    return result


def version_of(peer: str) -> str:
    """TRL's, as that Python has it."""
    command = [peer, "-c", "import importlib.metadata as m; print(m.version('trl'))"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def balance(world: int, budget: int, count: int) -> dict[str, Any]:
    """Straggling and fill of the plan's steps on a chat-like mix with long documents."""
    generator = np.random.default_rng(SEED)
    short = generator.random(count) < 0.85
    draws = np.where(
        short, generator.lognormal(6.3, 0.9, count), generator.lognormal(9, 0.8, count)
    )
    lengths = np.clip(draws, 16, budget).astype(np.int64)
    asked = np.zeros(count, bool)

    def lengths_of_rows(rows: np.ndarray) -> np.ndarray:
        asked[rows] = True
        return lengths[rows]

    config = PlanConfig(
        seed=SEED, epochs=1.0, shuffle=True, packing=True, tokens=budget, sequences=1,
        window=None, balance=True, group=world,
    )  # fmt: skip
    start = time.process_time()
    plan = Plan(count, lengths_of_rows, config)
    bins = plan.next_step()
    before_first, first = int(asked.sum()), len(np.concatenate(bins))
    bins += [members for step in iter(plan.next_step, []) for members in step if len(members)]
    spent = time.process_time() - start
    costs = costs_of(bins, lengths)
    return {
        "world": world,
        "tokens": budget,
        "rows": count,
        "steps": -(-len(bins) // world),
        "straggling": straggling(costs, world),
        "straggling_random": straggling(generator.permutation(costs), world),
        "straggling_of_smaller_models": {
            name: straggling(recosted(costs, bins, lengths, *shape), world)
            for name, shape in SMALLER.items()
        },
        "fill": _fill(lengths, len(bins), budget),
        "rows_of_first_step": first,
        "rows_tokenised_before_it": before_first,
        "plan_seconds": spent,
    }


def recosted(
    costs: np.ndarray, bins: list[np.ndarray], lengths: np.ndarray, products: int, layers: int,
    width: int,
) -> np.ndarray:  # fmt: skip
    """The packs' costs for LoRA on another model: attention weighs 7 layers width / 4N a token."""
    tokens = np.array([lengths[members].sum() for members in bins])
    return tokens + (costs - tokens) * EVEN * 7 * layers * width / (4 * products)


def _fill(lengths: np.ndarray, bins: int, budget: int = BUDGET) -> float:
    return float(lengths.sum() / (bins * budget))


def _median(values: list[float]) -> float:
    return float(np.median(values))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", default=sys.executable, help="a Python that has trl")
    parser.add_argument("--scratch", default="/tmp/tuneloom-lengths.npy")
    parser.add_argument("--balance", action="store_true", help="keep the packing that was measured")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"tokens": BUDGET}
    if options.balance:
        before = json.loads((record.RESULTS / "packing.json").read_text("utf-8"))
        kept = before.get("packing_made", before["made"])
        result |= {"peer": before["peer"], "packing": before["packing"], "packing_made": kept}
    else:
        result |= {"peer": f"trl {version_of(options.peer)}", "packing": packed(options)}
    balanced = []
    for world, budget, count in WORLDS:
        balanced.append(balance(world, budget, count))
        print(balanced[-1], flush=True)
    print(record.write("packing", {**result, "balance": balanced}, seed=SEED))
    return 0


def packed(options: argparse.Namespace) -> dict[str, Any]:
    """Every length distribution, against the peer."""
    found = {}
    for case, count in CASES.items():
        found[case] = compare(case, count, options.peer, options.scratch)
        print(case, found[case], flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
