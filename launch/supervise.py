"""Ranks as Ray actors in one placement group: started together, watched, restarted from the last
checkpoint.

Ray Core and not Ray Train: from a killed worker to the next step bare Ray Train takes twice to ten
times as long (benchmarks/results/recovery.json), it resumes from what its controller polled last,
up to one interval older than the disk, and each `report()` costs 2 s (2.60.0). Here a checkpoint on
disk that verifies is the only thing a restart believes.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tuneloom.errors import DiskError, RefusedError, Stopped, TrainingError, TuneloomError
from tuneloom.launch import elastic
from tuneloom.launch.admission import Admission
from tuneloom.launch.config import LaunchConfig
from tuneloom.launch.embedded import keep_private
from tuneloom.launch.head import Head, join
from tuneloom.launch.keepers import Keepers
from tuneloom.launch.machine import killed_for_memory
from tuneloom.launch.preflight import Facts, conduct
from tuneloom.launch.reaper import after_us
from tuneloom.launch.standby import Gang, Standby
from tuneloom.launch.worker import START_SECONDS, devices, environment, losses
from tuneloom.train import shm
from tuneloom.train.config import TrainConfig
from tuneloom.train.hangs import last_report
from tuneloom.train.runs import LOCK, folder_of, locked
from tuneloom.train.signals import HEARD, SIGNALS

READ_AT_IMPORT = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Every line of every rank, as it was written: Ray drops lines that repeat across workers."""
GROWS = "nodes returned"
"""How a gang ended that was asked to make room for a larger one."""
LEFT_OUT = "a node left out"
"""How a gang ended that stood on a node that did not pass preflight, before it trained."""
LEAVING_SECONDS = 10.0
"""For the ranks of a driver that was killed: they end within 4 s."""
SAVING_SECONDS = 30.0
LAST_WORDS_SECONDS = 5.0
"""After a rank failed, the others stand in a collective with it and will not answer any more."""
NODES_SECONDS = 120.0
"""How long nodes may take to join: `ray start` alone needs 30 to 40 s on a loaded machine."""
LAST_LINES_SECONDS = 1.0
"""For what ranks print last to come here: `ray.shutdown` drops what is still on its way, and waits
(half a second) at the end of an interpreter alone.
"""


def supervise(config: TrainConfig, launch: LaunchConfig) -> None:
    """Run the gang until it is done; restart it at most `max_restarts` times when a worker dies.

    Raises the error a rank raised, Stopped after a signal, TrainingError when workers kept dying.
    """
    if launch.kind == "local":
        keep_private()
    os.environ |= READ_AT_IMPORT
    import ray

    folder, signals = folder_of(config), list[int]()
    if (folder / LOCK).exists():  # a command that is refused must not touch the other's `stop`
        locked(folder, patience=LEAVING_SECONDS).close()
    (folder / "stop").unlink(missing_ok=True)  # of a driver that was killed after it was asked
    with ExitStack() as stack:
        stack.callback(shm.forget_run, folder)
        take_signals = stack.enter_context(signals_ask_to_stop(folder, signals))
        stack.callback(ray.shutdown)
        try:
            connect(launch, run=folder)
        except SystemExit as ended:  # by the handler that ray.init puts in place of ours
            if ended.code != signal.SIGTERM:
                raise
            raise Stopped(
                "stopped on a signal while Ray started; no rank had started; the same command "
                f"tries again with run.id={config.run.id}"
            ) from None
        take_signals()
        stack.callback(time.sleep, LAST_LINES_SECONDS)
        if launch.kind == "local":
            refuse_more_gpus(launch)
        keepers = None
        if launch.kind == "ray" and config.checkpoint.memory_every:
            keepers = Keepers(folder)
            stack.callback(forget_elsewhere, keepers, Head(folder / "stop"))
        keeps_its_folder(config)
        if launch.kind == "ray" and launch.min_workers is None:
            wait_for_nodes(launch.nodes, signals)
        try:
            attempts(config, launch, signals, keepers)
        except DiskError:
            if keepers:
                keepers.keep()
            raise


def attempts(
    config: TrainConfig, launch: LaunchConfig, signals: list[int], keepers: Keepers | None
) -> None:
    """Gang after gang until one is done; those that only grow or change nodes are no restarts."""
    restarts = grown = 0
    # Once: a node that is gone at a restart may take the cluster's only GPUs with it.
    gpus = gpus_per_worker(launch, signals)
    if launch.kind == "ray" and launch.gpus_per_worker == "auto" and not gpus:
        print(
            "launch.gpus_per_worker=auto: no GPU in this cluster; ranks train on processors",
            flush=True,
        )
    standby = Standby(launch.standby) if launch.standby is not None else None
    admission = Admission(gpus)
    try:
        while (
            ending := run_gang(
                config, launch, gpus, restarts + grown, signals, standby, admission, keepers
            )
        ) is not None:
            if ending in (GROWS, LEFT_OUT):
                grown += 1
                continue
            if signals:  # which the ranks that stand now have not heard of
                raise Stopped(
                    f"stopped on a signal; not all ranks saved it, as {ending}; the same command "
                    f"goes on from the newest checkpoint with run.id={config.run.id}"
                )
            if restarts == launch.max_restarts:
                raise TrainingError(
                    f"launch.max_restarts: all {restarts} restarts are used up; last: {ending}"
                )
            restarts += 1
            print(f"launch: {ending}; restart {restarts} of {launch.max_restarts}", flush=True)
    finally:
        if standby:
            standby.close()


def keeps_its_folder(config: TrainConfig) -> None:
    """A job's working_dir is a copy that Ray deletes, so a run must stand elsewhere."""
    import ray

    shipped = ray.get_runtime_context().runtime_env.get("working_dir")
    if shipped and not Path(config.run.root).is_absolute():
        raise RefusedError(
            f"run.root: {config.run.root!r} would lie in the working_dir that Ray deletes after "
            "the job; give an absolute folder that all nodes share"
        )


@contextmanager
def signals_ask_to_stop(folder: Path, came: list[int]) -> Iterator[Callable[[], object]]:
    """SIGTERM, SIGINT and SIGUSR1 leave a `stop` file that rank 0 reads at its next step, and their
    number in `came`; yields what takes them back from a handler of Ray's.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        HEARD.append(number)
        came.append(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stop").touch()
        print(f"launch: {signal.Signals(number).name}: saving, then stopping", flush=True)

    def take() -> dict[signal.Signals, Any]:
        return {number: signal.signal(number, handle) for number in SIGNALS}

    before = take()
    try:
        yield take
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def connect(launch: LaunchConfig, *, run: Path | None = None) -> None:
    """Start an embedded Ray (`local`) or join the cluster this process is on (`ray`).

    Never address="auto": on a shared host it follows a pointer in /tmp/ray into another user's
    cluster.
    """
    import ray

    shared: dict[str, Any] = {"logging_level": "error", "log_to_driver": True}
    if launch.kind == "local":
        ray.init(
            # As many again, for which Ray keeps processes ready: a restart takes those.
            address="local", num_cpus=max(2 * launch.workers, os.cpu_count() or 1),
            include_dashboard=False, object_store_memory=80 * 2**20,
            _node_ip_address="127.0.0.1",
            # Ray starts workers at nice 15, so that anything else on a workstation comes first.
            _system_config={"worker_niceness": 0}, **shared,
        )  # fmt: skip
        after_us(run)
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise RefusedError(
            "launch=ray: RAY_ADDRESS is unset; use `ray job submit`, or launch=local"
        )
    join(address, **shared)


def refuse_more_gpus(launch: LaunchConfig) -> None:
    """This machine gets no more, so there is nothing to wait for."""
    import ray

    wanted = gpus_per_worker(launch, []) * launch.workers
    have = int(ray.cluster_resources().get("GPU", 0))
    if wanted > have:
        raise RefusedError(
            f"launch.workers: {launch.workers} ranks need {wanted} GPUs, this machine has {have}; "
            "lower launch.workers, or set launch=ray or launch=slurm"
        )


def forget_elsewhere(keepers: Keepers, head: Head) -> None:
    """Give back what ranks that did not end by themselves left in the memory of their hosts."""
    if head.answers():  # or Ray's client ends this process soon, with 1
        keepers.forget()


def wait_for_nodes(count: int, signals: list[int]) -> None:
    """Until the cluster has `count` nodes; raises RefusedError naming those that are there, Stopped
    once there is one in `signals`.
    """
    import ray

    started, said = time.monotonic(), False
    while True:
        alive = [node for node in ray.nodes() if node["Alive"]]
        if len(alive) >= count:
            return
        if signals:
            raise Stopped(f"stopped on a signal; {len(alive)} of {count} nodes had joined")
        waited = time.monotonic() - started
        if waited > elastic.QUIET_SECONDS and not said:
            said = True
            print(
                f"launch: waiting {NODES_SECONDS - waited:.0f} s for {count} nodes, "
                f"{len(alive)} joined",
                flush=True,
            )
        if waited > NODES_SECONDS:
            names = ", ".join(sorted(node["NodeManagerHostname"] for node in alive))
            raise RefusedError(
                f"launch.nodes: {count} nodes expected, {len(alive)} joined the Ray cluster in "
                f"{NODES_SECONDS:.0f} s ({names}); look at the others' Ray logs"
            )
        time.sleep(0.3)


def run_gang(
    config: TrainConfig, launch: LaunchConfig, gpus: int, attempt: int, signals: list[int],
    standby: Standby | None, admission: Admission, keepers: Keepers | None,
) -> str | None:  # fmt: skip
    """One attempt: place, start, wait. None when done, GROWS, LEFT_OUT, or a sentence when a
    worker was lost.
    """
    from ray.exceptions import GetTimeoutError, OutOfMemoryError

    started, folder = time.time(), folder_of(config)
    killed = killed_for_memory()
    # The first attempt's clock runs since the command was started.
    clock = {"TUNELOOM_ATTEMPT_STARTED": str(started)} if attempt else {}
    group = elastic.micro_batches(config, launch)
    growth, head = None, Head(folder / "stop")
    with head.before_training():
        gang = standby.take() if standby else None
        if gang is None:
            sequence = config.batch.sequence_parallel
            gang = Gang(*elastic.place(launch, gpus, group, sequence, admission, signals))
            gang.start([environment() | devices(gpus)] * gang.size.workers, cpus=1, gpus=gpus)
            for actor in gang.actors:
                actor.import_now.remote()
    size, actors = gang.size, gang.actors
    if size.workers < launch.workers:
        config = elastic.with_group(config, size.workers, group)
    try:
        with head.before_training():
            places = places_of(actors)
            if launch.kind == "ray" and not admission.started:
                admission.start(places, preflight(actors, places, config, gpus))
                places = places_of(actors)  # ports not used yet
            elif admission.started and not admission.admits(actors, places, config):
                return LEFT_OUT
            if keepers:
                keepers.stand_on(place["node"] for place in places)
        if size.workers < launch.workers:
            nodes = frozenset(place["node"] for place in places)
            growth = elastic.Growth(
                folder / "stop", launch, size, gpus, config, admission, nodes
            )  # fmt: skip
        calls = [
            actor.run.remote(
                config.model_dump(mode="json"), size.model_dump(mode="json"),
                rendezvous(rank, places, attempt, gpus) | clock,
            )
            for rank, actor in enumerate(actors)
        ]  # fmt: skip
        if standby and growth is None:
            standby.follow(gang, places, folder / "metrics.jsonl")
        looks = [watched.look for watched in (head, growth, standby) if watched]
        wait(calls, meanwhile=lambda: [look() for look in looks])
        return None
    except Stopped:
        if head.lost:
            raise Stopped(head.sentence("all ranks saved and stopped")) from None
        if growth is None or not growth.asked or signals:
            raise
        return GROWS
    except GetTimeoutError:
        return f"a worker did not start in {START_SECONDS:.0f} s; look at Ray's logs on its node"
    except losses() as error:
        if head.gone():
            raise TrainingError(head.sentence("a worker was lost with it")) from None
        hang = last_report(folder, since=started)
        if hang:
            return hang.sentence
        reason = type(error).__name__
        if isinstance(error, OutOfMemoryError):
            reason = "Ray ended it, as this host's memory was all but full; `tuneloom plan`"
        elif killed_for_memory() > killed:
            reason = "this host ran out of memory, and the kernel killed a process; `tuneloom plan`"
        return f"a worker was lost ({reason})"
    finally:
        if head.gone():  # the slots are lost with it, and to give them back would hang
            gang.end()
            if standby:
                standby.abandon()
        elif standby and standby.keeps(gang):
            gang.end()
        else:
            gang.free()
        if growth and not head.lost:
            growth.close()
        if growth and growth.asked and not signals:  # by us, of ranks that may be gone
            (folder / "stop").unlink(missing_ok=True)


def places_of(actors: list[Any]) -> list[dict[str, Any]]:
    """Where each landed; raises Ray's GetTimeoutError where one has not started in time."""
    import ray

    found: list[dict[str, Any]] = ray.get(
        [actor.place.remote() for actor in actors], timeout=START_SECONDS
    )
    return found


def preflight(
    actors: list[Any], places: list[dict[str, Any]], config: TrainConfig, gpus: int
) -> Facts:
    """Compare what the ranks of a cluster see; returns rank 0's facts, or raises RefusedError with
    the reasons.
    """
    group = [rendezvous(rank, places, 0, gpus) for rank in range(len(actors))]
    return conduct(actors, places, config, gpus_per_rank=gpus, group=group)


def rendezvous(rank: int, places: list[dict[str, Any]], attempt: int, gpus: int) -> dict[str, str]:
    """What torch.distributed reads from the environment; rank 0's host is the meeting point."""
    node = places[rank]["node"]
    same_host = sum(place["node"] == node for place in places[:rank])
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(places)),
        # Ray shows a worker only its own GPU, as number 0.
        "LOCAL_RANK": "0" if gpus else str(same_host),
        "MASTER_ADDR": places[0]["address"],
        "MASTER_PORT": str(places[0]["port"]),
        "TUNELOOM_ATTEMPT": str(attempt),
    }


def wait(calls: list[Any], *, meanwhile: Callable[[], object] | None = None) -> None:
    """Until every rank returned; raises the first error, after the others had time to say the
    same, or to save where it is Stopped. `meanwhile` is called about once a second.

    Raises one of `losses` when a worker died: its peers fail in a collective, often before Ray
    knows.
    """
    import ray
    from ray.exceptions import RayTaskError

    waiting, failure, crash, deadline = calls, None, None, math.inf
    while waiting and time.monotonic() < deadline:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
        if meanwhile:
            meanwhile()
        try:
            for error in ray.get(done):
                failure = failure or (revived(error) if error else None)
        except RayTaskError as error:
            crash = crash or error
        if (failure or crash) and deadline == math.inf:
            patience = SAVING_SECONDS if isinstance(failure, Stopped) else LAST_WORDS_SECONDS
            deadline = time.monotonic() + patience
    if failure is not None:
        raise failure
    if crash is not None:
        raise TrainingError(f"a rank failed: {str(crash.cause).strip()}") from crash


def revived(error: dict[str, str]) -> TuneloomError:
    """A rank's error as the class it was."""
    classes = {kind.__name__: kind for kind in (*TuneloomError.__subclasses__(), DiskError)}
    return classes.get(error["class"], TrainingError)(error["message"])


def gpus_per_worker(launch: LaunchConfig, signals: list[int]) -> int:
    """GPUs a rank holds: what was asked, or 1 where the cluster has any, for which nodes that are
    missing have `launch.wait_seconds`; raises Stopped once there is one in `signals`.
    """
    import ray

    if launch.gpus_per_worker != "auto":
        return launch.gpus_per_worker
    deadline, said = time.monotonic() + launch.wait_seconds, False
    while not ray.cluster_resources().get("GPU", 0):
        joined = sum(node["Alive"] for node in ray.nodes())
        missing = launch.kind == "ray" and joined < launch.nodes
        if not missing or time.monotonic() > deadline:
            return 0
        if signals:
            raise Stopped(f"stopped on a signal; {joined} of {launch.nodes} nodes had joined")
        if not said:
            said = True
            print(
                f"launch.gpus_per_worker=auto: waiting {launch.wait_seconds:g} s for a node with "
                f"GPUs, {joined} of {launch.nodes} joined; 0 or 1 would not wait",
                flush=True,
            )
        time.sleep(0.3)
    return 1
