"""Reading DeepSpeed's shards: mapped, so that restoring copies once, and unpickled by names.

DeepSpeed 0.19.8 reads them with `weights_only=False`, all into new memory: that runs whatever a
pickle names, and takes twice as long (`benchmarks/checkpoint.py`). The digests of a manifest guard
against damage; against a file made to run code, which whoever can write a shard can list too, there
are the names below: nothing else is looked up.

`python -m tuneloom.train.shards --input_folder ... --output_folder ...` is DeepSpeed's converter to
the universal format, under the same rule.
"""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tuneloom.errors import RefusedError

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Makes every `torch.load` restricted, those that DeepSpeed calls with weights_only=False too."""


def allowed() -> list[Any]:
    """What shards name beside tensors and plain values; none does anything when it is made."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # Some Pythons (3.11.2, which is Debian's; not 3.11.7) pickle a member of an enum as `getattr`.
    return [
        DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address,
        (_member, "builtins.getattr"),
    ]  # fmt: skip


def _member(kind: Any, name: str) -> Any:
    """`getattr` for a member of DeepSpeed's enum and nothing else."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError(f"GLOBAL getattr({kind!r},{name!r})")
    return ZeroStageEnum[name]


@contextmanager
def restricted() -> Iterator[None]:
    """Within it no `torch.load` of this process makes anything but what is `allowed`."""
    torch.serialization.add_safe_globals(allowed())
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        yield
    except pickle.UnpicklingError as error:
        raise RefusedError(
            f"resume: a shard of the checkpoint names what none of ours does ({_named(error)}); "
            "move that checkpoint away, and find out who wrote it"
        ) from None
    finally:
        if before is None:
            del os.environ[FORCED]
        else:
            os.environ[FORCED] = before


def _named(error: Exception) -> str:
    """What torch would not make, out of its long advice."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found[1] if found else str(error).strip().splitlines()[0]


def load(path: Path) -> Any:
    """A file of a checkpoint, in memory of its own. Raises RefusedError for one that names other
    classes.
    """
    with restricted():
        return torch.load(path, map_location="cpu")


def load_mapped(path: Path | str, map_location: Any = "cpu") -> Any:
    """The same with CPU tensors that are pages of the file, private to this process and writable:
    for what is copied from at once. The file may be deleted, not written to.
    """
    with restricted():
        return torch.load(path, map_location=map_location, mmap=True)


@contextmanager
def read_by(engine: Any) -> Iterator[None]:
    """Within it DeepSpeed's engine reads its shards mapped and restricted; it keeps none of their
    pages.
    """
    engine.checkpoint_engine.load = load_mapped
    owning = engine.basic_optimizer.register_load_state_dict_post_hook(_own)
    try:
        with restricted():
            yield
    finally:
        owning.remove()
        del engine.checkpoint_engine.load


def _own(optimizer: torch.optim.Optimizer) -> None:
    """Copy the moments, which torch's `load_state_dict` takes as they are on a CPU. DeepSpeed makes
    views of them next.
    """
    for entry in optimizer.state.values():
        entry |= {k: v.clone() for k, v in entry.items() if torch.is_tensor(v) and v.is_cpu}


if __name__ == "__main__":
    from deepspeed.checkpoint import ds_to_universal

    with restricted():
        ds_to_universal.main(ds_to_universal.parse_arguments())
