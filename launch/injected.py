"""`python -m tuneloom.launch.injected FAULT RANK STEP [overrides]`: one rank of a run, as torchrun
would start it, on which something goes wrong; for drills of faults that no signal makes.

FAULT happens on rank RANK, in STEP or from it on:
    nan      the loss is NaN, in this step
    nans     the loss is NaN, from this step on
    crossed  the rank calls another collective than its peers
    stopped  the rank stops, as by SIGSTOP from outside
    data     the rank stands still while it reads the rows of this step
    save     the rank stands still in the first save from this step on
    slow     every forward pass takes 40 ms longer, from this step on
    spike    the learning rate is a hundred times as large for three steps (of all ranks)
    clock    the clock of the machine is put back by an hour (of all ranks)
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tuneloom.train import __main__ as rank
from tuneloom.train import checkpoint, distributed, loop
from tuneloom.train.batches import MicroBatch
from tuneloom.train.feed import Feed
from tuneloom.train.session import Session, Tally

SLOWER_SECONDS = 0.04
HOUR = 3600.0
SPIKE_STEPS = 3


class Fault:
    """Knows which step this rank is in, and puts a broken part where the loop finds it."""

    def __init__(self, at: int, *, mine: bool) -> None:
        self.at, self.mine = at, mine
        self.step = 0
        self.before_agree: Callable[[], None] = lambda: None
        agree = Session.agree

        def counted(session: Session, micros: list[MicroBatch]) -> Tally:
            self.step = session.step + 1
            self.before_agree()
            return agree(session, micros)

        setattr(Session, "agree", counted)  # noqa: B010 - mypy takes no method of that name

    def around_loss(self, change: Callable[..., Tensor]) -> None:
        """Have `change(loss_sum, engine, micro)` in place of the loss of this rank."""
        loss_sum = loop.loss_sum

        def broken(network: Any, micro: MicroBatch) -> Tensor:
            return change(loss_sum, network, micro) if self.mine else loss_sum(network, micro)

        loop.loss_sum = broken


def break_something(name: str, number: int, at: int) -> None:
    """Install the fault in this process."""
    fault = Fault(at, mine=int(os.environ["RANK"]) == number)
    if name in ("nan", "nans"):
        last = at if name == "nan" else sys.maxsize
        fault.around_loss(
            lambda real, engine, micro: (
                real(engine, micro) * (torch.nan if at <= fault.step <= last else 1.0)
            )
        )
    elif name == "spike":
        set_lr = Session.set_lr
        steps = range(at, at + SPIKE_STEPS)
        setattr(  # noqa: B010 - as above
            Session, "set_lr",
            lambda s, factor: set_lr(s, factor * (100.0 if s.step + 1 in steps else 1.0)),
        )  # fmt: skip
    elif name == "slow":
        fault.around_loss(lambda real, engine, micro: slower(real(engine, micro), fault.step >= at))
    elif name == "crossed":
        fault.before_agree = lambda: crossed(fault)
    elif name == "stopped":
        fault.before_agree = lambda: stopped(fault)
    elif name == "data":
        before(Feed, "mine", lambda: standing(fault, fault.step + 1))
    elif name == "save":
        before(checkpoint, "write_share", lambda: standing(fault, fault.step))
    elif name == "clock":
        now = time.time
        time.time = lambda: now() - (HOUR if fault.step >= at else 0.0)
    else:
        raise SystemExit(f"injected: no fault {name}")


def before(owner: Any, name: str, first: Callable[[], None]) -> None:
    """Have `first` called before a function of a module or class."""
    function = getattr(owner, name)

    def both(*given: Any) -> Any:
        first()
        return function(*given)

    setattr(owner, name, both)


def slower(loss: Tensor, late: bool) -> Tensor:
    time.sleep(SLOWER_SECONDS if late else 0.0)
    return loss


def crossed(fault: Fault) -> None:
    if fault.mine and fault.step == fault.at:
        distributed.broadcast_object(None)


def stopped(fault: Fault) -> None:
    if fault.mine and fault.step == fault.at:
        os.kill(os.getpid(), signal.SIGSTOP)


def standing(fault: Fault, step: int) -> None:
    """Longer than any watchdog waits."""
    if fault.mine and step >= fault.at:
        time.sleep(HOUR)


if __name__ == "__main__":
    break_something(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    sys.exit(rank.main(sys.argv[4:]))
