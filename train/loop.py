"""The training loop: read this first. Set-up is `Session.prepare`, in dependency order; then one
flat loop.
"""

import math
import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from tuneloom import imports
from tuneloom.errors import Stopped, TrainingError
from tuneloom.train import debug, distributed, runs
from tuneloom.train.config import TrainConfig
from tuneloom.train.loss import loss_sum
from tuneloom.train.schedule import lr_at
from tuneloom.train.session import Session
from tuneloom.train.watchdog import collective_seconds


@dataclass(frozen=True)
class Outcome:
    """What a finished run was."""

    run_id: str
    steps: int
    loss: float


def fit(config: TrainConfig, *, launcher: dict[str, Any] | None = None) -> Outcome:
    """Train as this rank of the process group that the environment names; collective.

    Raises Stopped after a save that a signal asked for, TrainingError when the run failed.
    """
    joined_here = not distributed.is_joined()
    world = distributed.start(timeout_seconds=collective_seconds(config.train.hang_seconds))
    import_all()
    config = distributed.broadcast_object(runs.with_id(config))
    session = Session(config, world, launcher or {})
    try:
        session.prepare()
        if not config.debug:
            return loop(session)
        with debug.anomalies_named():
            outcome = loop(session)
        if world.first:
            print(debug.verdict(session.folder), flush=True)
        return outcome
    except BaseException as error:
        session.abandon(error)
        raise
    finally:
        session.close()
        distributed.restore_interfaces()
        if joined_here and world.size > 1:  # a process alone may train again: sweeps, notebooks
            distributed.stop()


def import_all() -> None:
    """What a run imports on its way to the first step; standby does it in advance."""
    imports.adapters()
    imports.arrow()
    with imports.unswept():
        for name in ("deepspeed", "transformers.models.auto.modeling_auto"):
            import_module(name)


def loop(s: Session) -> Outcome:
    """Step until the epochs or steps are over, or until asked to stop."""
    config, world, engine, clock = s.config, s.world, s.engine, s.clock
    bad_steps = 0
    clock.switch("productive")
    while True:
        # what is due between steps
        if s.due(config.train.validate_every):
            s.validate()
        if s.due(config.train.sample_every):
            s.sample()
        if s.due(config.checkpoint.every):
            s.save()
        if s.due(config.checkpoint.memory_every):
            s.remember()
        if s.ended_early or 0 < s.last_step <= s.step:
            break

        # all micro-batches of the step, and what every rank agrees on
        started, progress = time.monotonic(), s.progress()
        with clock.phase("data"):
            bins = s.feed.next_step()
            micros = s.feed.mine(bins)
        if not bins:
            break
        tally = s.agree(micros)

        # forward and backward of each: token losses, summed, over the whole step's target tokens.
        # DeepSpeed averages gradients over ranks, hence times world; it must not divide by
        # accumulation.
        lr = s.set_lr(lr_at(s.step, progress, config.optim))
        total = torch.zeros((), dtype=torch.float32, device=world.device)
        for index, micro in enumerate(micros):
            with s.pace.timed(micro.tokens + micro.padded):
                part = micro.shard(world.sequence_rank, world.sequence)  # whole where S is 1
                micro_loss = loss_sum(engine, part)
            engine.backward(micro_loss * (world.size / tally.target_tokens), scale_wrt_gas=False)
            total += micro_loss.detach()
            if index + 1 < len(micros):
                engine.step()  # counts the micro-batch; the optimizer steps after the last

        # the optimizer step, refused on all ranks alike when it is not finite
        grad_norm, applied = s.optimizer_step()
        s.step += 1
        with clock.phase("collective"):  # NCCL only enqueues here, gloo waits
            distributed.sum_over_ranks(total)
        loss = s.last_loss = float(total) / tally.target_tokens
        seeking_scale = s.loss_scale > 1.0  # fp16: an overflow halves it, and is no fault of a row
        good = math.isfinite(loss) and (applied or seeking_scale)
        bad_steps = 0 if good else bad_steps + 1
        s.record(bins, loss=loss, grad_norm=grad_norm, lr=lr, tally=tally, applied=applied,
                 seconds=time.monotonic() - started)  # fmt: skip
        if bad_steps > config.train.max_bad_steps:
            s.settle()
            raise TrainingError(
                f"train.max_bad_steps: {bad_steps} steps in a row were not finite, the last was "
                f"step {s.step}; look at their rows in exposure/, or go on under another run.id "
                "with a lower optim.lr and resume=CHECKPOINT of this run"
            )

        # asked to stop: all ranks know since they agreed, all save this step
        if tally.stop:
            s.save()
            s.settle()
            raise Stopped(
                f"stopped after step {s.step} on a signal; the same command resumes it with "
                f"run.id={config.run.id}"
            )
    s.finish()
    return Outcome(str(config.run.id), s.step, s.last_loss)
