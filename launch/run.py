"""`tuneloom train`: validate, plan, claim the run, launch its ranks, end with the contract's exit
code.
"""

import os
import time

from tuneloom import imports
from tuneloom.errors import ConfigError
from tuneloom.launch.config import JobConfig, training_of
from tuneloom.launch.plan import check
from tuneloom.launch.worker import devices
from tuneloom.train.rules import refuse_unread
from tuneloom.train.runs import folder_of, refuse_masked, with_id

CONFIG = JobConfig


def main(config: JobConfig) -> int:
    """Refuse what cannot fit, launch and wait; returns 0, or raises the TuneloomError that ended
    the run.
    """
    os.environ["TUNELOOM_STARTED"] = str(time.time())  # a sweep's next job has a clock of its own
    refuse_unread(training_of(config))
    refuse_masked(training_of(config))
    job = with_id(config)
    if job.launch.kind == "slurm":
        from tuneloom.launch.slurm import launch_slurm

        return launch_slurm(job)
    if job.launch.nodes > 1 and job.launch.kind != "ray":
        raise ConfigError(
            f"launch.nodes: launch={job.launch.kind} is this machine alone, got {job.launch.nodes};"
            " set launch=ray or launch=slurm"
        )
    training = training_of(job)
    if job.launch.kind == "inline" and job.launch.gpus_per_worker == 0:
        os.environ |= devices(0)  # before torch looks
    check(job)
    print(f"run {job.run.id} in {folder_of(training)}", flush=True)
    if config.launch.kind == "inline":
        with imports.unswept():
            from tuneloom.train.loop import fit

        fit(training, launcher=job.launch.model_dump(mode="json"))
    else:
        from tuneloom.launch.supervise import supervise

        supervise(training, job.launch)
    return 0
