"""Preflight's questions to real Ray actors: answered in time, or refused with the names of those
that did not answer.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tuneloom.testing import small_config

PATIENCE = 8
OFF = 7.5

# Two ranks are asked once a fault; rank 1 has it. A stalled answer comes after preflight is over.
ASK = """
import contextlib, io, json, sys, time
from tuneloom.launch.embedded import keep_private
keep_private()
import ray
from tuneloom.config import build
from tuneloom.errors import RefusedError
from tuneloom.launch import admission, preflight
from tuneloom.launch.supervise import rendezvous
from tuneloom.launch.worker import Worker, environment
from tuneloom.train.config import TrainConfig

config, patience, off = json.loads(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])

class Rank(Worker):
    def have(self, fault):
        self.fault, self.asked = fault, 0
    def stall(self, question):
        if self.fault == question:
            time.sleep(patience + 1)
    def examine(self, *arguments):
        self.stall("examine")
        return super().examine(*arguments)
    def unseen_by(self, *arguments):
        self.stall("unseen_by")
        return super().unseen_by(*arguments)
    def now(self):
        self.stall("now")
        if self.fault != "clock":
            return super().now()
        ahead, self.asked = super().now() + off, self.asked + 1
        time.sleep(1 if self.asked == 1 else 0)  # the way back of the first answer is slow
        return ahead
    def links(self, *arguments):
        self.stall("links")
        import torch.distributed as dist
        real = dist.all_reduce
        def wrong(tensor):
            real(tensor)
            tensor += 1
        dist.all_reduce = wrong if self.fault == "sum" else real
        try:
            return super().links(*arguments)
        finally:
            dist.all_reduce = real

ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20,
         _node_ip_address="127.0.0.1", logging_level="error", log_to_driver=False)
actors = [ray.remote(Rank).options(num_cpus=1).remote(environment()) for _ in range(2)]
train, found = build(TrainConfig, config), {}
for fault in ("none", "examine", "unseen_by", "now", "links", "sum", "clock"):
    ray.get([actors[0].have.remote(None), actors[1].have.remote(fault)])
    places = [place | {"host": f"n{rank + 1}"} for rank, place in
              enumerate(ray.get([actor.place.remote() for actor in actors]))]
    stalls = fault in ("examine", "unseen_by", "now", "links")
    preflight.PATIENCE_SECONDS = patience if stalls else 60.0
    started, said = time.monotonic(), io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            group = [rendezvous(rank, places, 0, 0) for rank in range(2)]
            facts = preflight.conduct(actors, places, train, gpus_per_rank=0, group=group)
        except RefusedError as error:
            print(error)
    found[fault] = {"said": said.getvalue(), "seconds": time.monotonic() - started,
                    "left": preflight.probe_folder(train).exists()}
ray.get(actors[1].have.remote("clock"))
deadline = time.monotonic() + 60
found["skew"] = [preflight.skew(actor, deadline=deadline) for actor in actors]
places[1]["node"] = "new"
for fault, seconds in ((None, 60.0), ("clock", 60.0), ("examine", 1.0)):  # who joins later
    ray.get(actors[1].have.remote(fault))
    admission.PATIENCE_SECONDS, joined = seconds, admission.Admission(0)
    joined.start(places[:1], facts)
    with contextlib.redirect_stdout(io.StringIO()):
        admitted = joined.admits(actors, places, train)
    found[f"joined, {fault}"] = {"admitted": admitted, "left_out": joined.left_out,
                                 "selector": joined.selector(frozenset())}
class Silent(Worker):
    def place(self):
        time.sleep(60 if stalled == "place" else 0)
        return super().place()
    def examine(self, *arguments):
        time.sleep(60)

for actor in actors:
    ray.kill(actor)
admission.Worker, admission.PATIENCE_SECONDS, admission.START_SECONDS = Silent, 1.0, 3.0
for stalled in ("examine", "place"):  # a shrunken run looks for room on another node
    slots, joined = ray.util.placement_group([{"CPU": 1}]), admission.Admission(0)
    ray.get(slots.ready())
    joined.start([], facts)
    probes, answers = admission.Probes(slots, 1, share=1, gpus=0), []
    with contextlib.redirect_stdout(io.StringIO()):
        while (answer := probes.agree(joined, train, 1)) is None:
            answers.append(answer)
            time.sleep(0.2)
    probes.end()
    ray.util.remove_placement_group(slots)
    found[f"room, {stalled}"] = {"sound": answer, "looks": len(answers),
                                 "left_out": list(joined.left_out.values())}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(lab: Path) -> dict[str, Any]:
    """By fault: what preflight said, how long it took, and whether it left its folder."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    config = json.dumps(small_config(lab, "asked"))
    done = subprocess.run(
        [sys.executable, "-c", ASK, config, str(PATIENCE), str(OFF)], env=outer, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_ranks_that_agree_may_start_and_their_links_and_sums_are_compared(
    found: dict[str, Any],
) -> None:
    first, second = found["none"]["said"].splitlines()
    assert re.fullmatch(
        r"preflight: 2 rank\(s\) on 2 node\(s\) agree; slowest link . \(n.\) -> . \(n.\) "
        r"\d+\.\d\d GB/s, median \d+\.\d\d GB/s; \d+ s",
        first,
    )
    assert re.fullmatch(
        r"preflight: all-reduce of 16 MiB: slowest rank (0 on n1|1 on n2) \d+ MB/s, "
        r"fastest rank (0 on n1|1 on n2) \d+ MB/s",
        second,
    )
    assert not found["none"]["left"] and found["none"]["seconds"] < 60


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("examine", "what it sees of its host"),
        ("unseen_by", "the other ranks' files in the run folder"),
        ("now", "the time of day"),
        ("links", "the speed of its links"),
    ],
)
def test_a_rank_that_stalls_is_named_in_time_with_what_it_was_asked(
    found: dict[str, Any], question: str, words: str
) -> None:
    said, seconds = found[question]["said"], found[question]["seconds"]
    assert said.startswith("preflight: 1 reason(s) not to start\n")
    assert f"no answer: rank 1 on n2, asked for {words}, said nothing" in said
    assert PATIENCE - 0.1 <= seconds < PATIENCE + 3
    assert not found[question]["left"]


def test_a_wrong_sum_is_refused_by_the_rank_that_got_it(found: dict[str, Any]) -> None:
    said = found["sum"]["said"].splitlines()
    assert said == ["preflight: 1 reason(s) not to start",
                    "  all-reduce: rank 1 got 4.0 where 3.0 is due (n2)"]  # fmt: skip


def test_a_clock_is_read_from_the_fastest_of_three_answers(found: dict[str, Any]) -> None:
    ours, theirs = found["skew"]
    assert abs(ours) < 0.2 and abs(theirs - OFF) < 0.2  # the slow answer alone would say 7
    assert "clock: rank 1 on n2 is +7.5 s off" in found["clock"]["said"]


def test_a_node_that_joins_later_is_left_out_when_it_is_wrong_or_says_nothing(
    found: dict[str, Any],
) -> None:
    assert found["joined, None"] == {"admitted": True, "left_out": {}, "selector": {}}
    for fault, reason in (
        ("clock", f"clock: rank 1 on n2 is {OFF:+.1f} s off; start chrony or ntpd"),
        ("examine", "no answer in 1 s; look at its disks and network"),
    ):
        joined = found[f"joined, {fault}"]
        assert not joined["admitted"] and joined["selector"] == {"ray.io/node-id": "!in(new)"}
        assert joined["left_out"] == {"new": f"n2: {reason}"}


@pytest.mark.parametrize(
    ("question", "reason"),
    [("examine", r".+: no answer in 1 s; look at its disks and network"),
     ("place", r"node [0-9a-f]{12}: no worker started in 3 s; look at Ray's logs there")],
)  # fmt: skip
def test_a_node_that_is_looked_at_for_room_and_says_nothing_is_left_out(
    found: dict[str, Any], question: str, reason: str
) -> None:
    room = found[f"room, {question}"]
    assert room["sound"] is False and room["looks"] > 2  # training is not held up by the question
    assert len(room["left_out"]) == 1 and re.fullmatch(reason, room["left_out"][0]), room
