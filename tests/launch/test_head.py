"""Ray's head dies under a run: the ranks save, the launcher ends with 75 and says what to do."""

import json
import os
import signal
from pathlib import Path

from tests.launch.test_ports import family, training


def test_a_dead_head_ends_the_run_with_75_after_its_ranks_have_saved(lab: Path) -> None:
    with training(lab, "beheaded") as driver:
        (store,) = [
            pid
            for pid in family(driver.pid)
            if b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
        ]
        os.kill(store, signal.SIGKILL)
        code = driver.wait(120)
    said = (lab / "beheaded.log").read_text(encoding="utf-8", errors="replace")
    assert code == 75, said[-3000:]
    assert "answers no more; all ranks saved and stopped" in said
    facts = json.loads((lab / "runs/beheaded/run.json").read_text(encoding="utf-8"))
    rows = (lab / "runs/beheaded/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row["step"] for row in map(json.loads, rows) if "train/loss" in row]
    saved = sorted((lab / "runs/beheaded/checkpoints").glob("step-*"))[-1].name
    assert (facts["state"], saved) == ("stopped", f"step-{steps[-1]:06d}")
