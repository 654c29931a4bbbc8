"""The first-checkpoint drill: what was saved is opened by a fresh process while training goes on.

Empty adapters (trl#4416: 40 bytes) and weights that load but answer otherwise are found at the
first checkpoint, not after the last.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuneloom.errors import TrainingError
from tuneloom.train import distributed, weights

if TYPE_CHECKING:
    from tuneloom.train.session import Session

PROBE_TOKENS = 32


class FirstCheckpoint:
    """Saves weights and live logits in runs/<id>/drill and starts the process that compares
    them.
    """

    def __init__(self, session: "Session") -> None:
        self.world, self.folder = session.world, session.folder / "drill"
        self.step = session.step
        self._process: subprocess.Popen[str] | None = None
        generator = torch.Generator().manual_seed(session.config.seed)
        ids = torch.randint(0, session.vocabulary, (1, PROBE_TOKENS), generator=generator)
        logits = weights.live_logits(session.network, ids, self.world.device)
        weights.save(session.engine, session.tokenizer, self.folder, self.world)
        facts: dict[str, Any] = {
            "step": self.step,
            "base": str(session.base.resolve()),
            "dtype": session.config.model.dtype,
            "method": session.config.method.kind,
            "double_quantisation": session.config.method.double_quantisation,
            "fp8": session.config.model.fp8,
            "extra_modules": session.config.method.extra_modules,
        }
        distributed.on_first(
            lambda: weights.store_probe(self.folder, ids, logits, facts), where=self.folder
        )
        if self.world.first:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tuneloom.train.drill", str(self.folder)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                # On processors: the GPU has no room for the base once more beside training.
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            )  # fmt: skip

    def verdict(self) -> None:
        """Wait for the comparison; raises TrainingError on all ranks when it failed."""
        fault = None
        if self._process is not None:
            _, errors = self._process.communicate()
            fault = _fault(self.folder / "drill.json", errors)
        fault = distributed.broadcast_object(fault)
        if fault:
            raise TrainingError(
                f"train.drill: the checkpoint of step {self.step}, opened by a fresh process, "
                f"{fault}; its files are in {self.folder}"
            )


def passed_before(run: Path) -> bool:
    """Whether a checkpoint of this run has been drilled, and its logits were the same."""
    try:
        return json.loads((run / "drill" / "drill.json").read_text("utf-8"))["ok"] is True
    except (OSError, ValueError, KeyError, TypeError):  # none, or cut off with its process
        return False


def _fault(path: Path, errors: str) -> str | None:
    if not path.exists():
        return _unread(errors)
    try:
        verdict = json.loads(path.read_text(encoding="utf-8"))
        return None if verdict["ok"] else f"gives other logits ({json.dumps(verdict)})"
    except (ValueError, KeyError, TypeError):  # cut off as it was written
        return _unread(errors)


def _unread(errors: str) -> str:
    last = (errors.strip().splitlines() or ["no output; look at this host's memory"])[-1]
    return f"could not be read: {last}"
