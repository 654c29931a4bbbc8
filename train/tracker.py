"""W&B behind one door: a run always writes its own offline file, and a side process uploads it.

`wandb.init` blocks 90 s on a server that does not answer and then raises (measured, 0.31.0), and a
failed one cannot be followed by an offline one of the same id. So training only ever writes a file,
and what the network does costs no step and loses no row.
"""

import os
from pathlib import Path
from typing import Any

from tuneloom.train.config import TrackerConfig
from tuneloom.train.uploader import Uploader


class Tracker:
    """`mode` and `reason` say what really happens: online, offline or off, and why."""

    def __init__(
        self, tracker: TrackerConfig, folder: Path, run_id: str, config: dict[str, Any]
    ) -> None:
        self.run: Any = None
        self.uploader: Uploader | None = None
        self.mode, self.reason = _decide(tracker.mode)
        print(f"tracker: W&B {self.mode} ({self.reason})", flush=True)
        if self.mode == "off":
            return
        import wandb

        root = folder / "wandb"
        root.mkdir(exist_ok=True)
        earlier = sorted(root.glob("offline-run-*"))
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, x_disable_stats=True
        )  # fmt: skip
        self.run = wandb.init(
            mode="offline", settings=settings, project=tracker.project, id=run_id, name=run_id,
            dir=str(folder), config=config, resume="allow",
        )  # fmt: skip
        if self.mode == "online":
            self.uploader = Uploader(earlier, Path(self.run.dir).parent)

    def log(self, row: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def finish(self) -> None:
        """Close the file; wait for its upload while that gets on, and say so where it did not."""
        if self.run is not None:
            self.run.finish()
            self.run = None
        if self.uploader is not None:
            left = self.uploader.finish()
            self.uploader = None
            if left:
                print(f"tracker: {left}", flush=True)


def _decide(wanted: str) -> tuple[str, str]:
    if wanted != "auto":
        return wanted, "asked for"
    if os.environ.get("WANDB_API_KEY") or _netrc_has_wandb():
        return "online", "a key was found"
    return "offline", "no key was found; `wandb sync` uploads later"


def _netrc_has_wandb() -> bool:
    netrc = Path.home() / ".netrc"
    return netrc.exists() and "api.wandb.ai" in netrc.read_text(encoding="utf-8", errors="replace")
