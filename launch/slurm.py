"""`tuneloom train launch=slurm ...`: one batch script, rendered, submitted, followed.

slurm/finetune.sbatch is the same template with its defaults: python -m tuneloom.launch.slurm
prints it. A submitted job reads its whole config from runs/<id>/slurm/<digest>/local/job.yaml, so
what was validated on the login node is what runs, whatever is submitted after it.
"""

import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from tuneloom.errors import (
    CONFIGURATION,
    DATA,
    DONE,
    GATE,
    REFUSED,
    STOPPED,
    TRAINING,
    ConfigError,
    RefusedError,
)
from tuneloom.launch.config import SIGNAL_SLACK, SLURM_ONLY, JobConfig, LaunchConfig, training_of
from tuneloom.train.runs import folder_of, recorded

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY",
        "BOOT_FAIL", "DEADLINE", "PREEMPTED")  # fmt: skip
CODES = (CONFIGURATION, DATA, REFUSED, TRAINING, GATE, STOPPED)
"""What a run that is not done ends with."""
FORGOTTEN = "FORGOTTEN"
"""Ours: slurmctld drops a job MinJobAge seconds (300 by default) after its end."""
SCRIPT = "finetune.sbatch"
POLL_SECONDS = 2.0
ANSWER_SECONDS = 120
"""For sbatch and scontrol, which wait for a controller that is busy."""


def launch_slurm(job: JobConfig) -> int:
    """Print the script, or submit it and, unless told otherwise, follow; returns the exit code."""
    if job.launch.dry_run:
        print(render(job), end="")
        if not (submission_of(job) / "local" / "job.yaml").exists():
            print(f"# Not submitted, so it has no {submission_of(job)}/local/job.yaml to read yet.")
        return 0
    folder, submission = folder_of(training_of(job)), submission_of(job)
    write_submission(job, submission)
    number = submit(submission / SCRIPT)
    print(f"slurm: job {number}, run {job.run.id}; scancel {number} ends it", flush=True)
    return follow(number, folder) if job.launch.follow else 0


def render(job: JobConfig) -> str:
    """The batch script of a job."""
    folder = folder_of(training_of(job))
    python = job.launch.python or ("python" if job.launch.container else sys.executable)
    setup = [f"TUNELOOM_PYTHON={shlex.quote(python)}"]
    if job.launch.container:
        setup.append(f"TUNELOOM_CONTAINER={shlex.quote(' '.join(job.launch.container))}")
    elif not job.launch.python:
        setup = [f'[ -n "${{TUNELOOM_PYTHON:-}}${{TUNELOOM_CONTAINER:-}}" ] || {setup[0]}']
    # In place of the checkout's own `local`, which nothing comes after.
    arguments = [
        "--config-dir", str(submission_of(job).absolute()), "local=job",
        f"run.id='{job.run.id}'", f"launch.workers={job.launch.workers}",
    ]  # fmt: skip
    return _template().render(
        usage="runs/<id>/slurm/<digest>/finetune.sbatch",
        header=header(job.launch, name=job.run.name, output=str(output_of(folder, "%j"))),
        folder=shlex.quote(os.getcwd()),
        signal_seconds=job.launch.signal_seconds,
        slack_seconds=SIGNAL_SLACK,
        setup=setup,
        arguments=shlex.join(arguments),
    )  # fmt: skip


def render_default() -> str:
    """slurm/finetune.sbatch: the arguments are the caller's, resources are sbatch's own flags."""
    launch = LaunchConfig(kind="slurm", gpus_per_worker=0)
    return _template().render(
        usage="[--nodes=2 --gpus-per-node=8 --cpus-per-task=64 ...] slurm/finetune.sbatch "
        "experiment=... key=value",
        header=header(launch, name="finetune", output="finetune-%j.out"),
        folder=None,
        signal_seconds=launch.signal_seconds,
        slack_seconds=SIGNAL_SLACK,
        setup=[],
        arguments='"$@"',
    )


def header(launch: LaunchConfig, *, name: str, output: str) -> list[str]:
    """The #SBATCH options."""
    if any(c.isspace() or c in "\"'\\" for c in output):
        raise ConfigError(f"run.root: {output!r} stands in an #SBATCH line; use a path without "
                          "spaces or quotes")  # fmt: skip
    ranks = launch.workers // launch.nodes
    gpus = launch.gpus_per_node
    if gpus is None:
        gpus = 0 if launch.gpus_per_worker == 0 else ranks
    if launch.gpus_per_worker != 0 and gpus < ranks:
        raise ConfigError(
            f"launch.gpus_per_node: {gpus} are too few for {ranks} ranks a node; raise it, or set "
            "launch.gpus_per_worker=0 to train on processors"
        )
    options: dict[str, Any] = {
        "job-name": name,
        "account": launch.account,
        "partition": launch.partition,
        "time": launch.time,
        "nodes": launch.nodes,
        "ntasks-per-node": ranks,
        "cpus-per-task": launch.cpus_per_worker or (8 if gpus else 1),
        "gpus-per-node": gpus or None,
        "mem": launch.memory,
        "output": output,
        "open-mode": "append",
        "signal": f"B:USR1@{launch.signal_seconds}",
    }
    return ["--requeue"] + [f"--{k}={v}" for k, v in options.items() if v is not None]


def output_of(folder: Path, number: str) -> Path:
    """Where a job's output goes."""
    return folder.absolute() / "slurm" / f"{number}.out"


def config_text(job: JobConfig) -> str:
    """The resolved config as a file of its own, without what only the submission reads. The job
    composes it again, and gets the same values.
    """
    content = job.model_dump(mode="json")
    content["launch"] = {k: v for k, v in content["launch"].items() if k not in SLURM_ONLY}
    content["launch"]["kind"] = "ray"
    return "# @package _global_\n" + yaml.dump(content, Dumper=Literally, sort_keys=False)


class Literally(yaml.SafeDumper):
    """Every text in quotes, since OmegaConf reads more of the bare ones as numbers than YAML does
    (12e4567), and without interpolations.
    """

    def represent_str(self, data: str) -> yaml.ScalarNode:
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", data)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"')


Literally.add_representer(str, Literally.represent_str)


def submission_of(job: JobConfig) -> Path:
    """The folder of what a job reads: another config of the same run has another, since the jobs
    before may still wait in the queue.
    """
    digest = hashlib.sha256(config_text(job).encode()).hexdigest()[:12]
    return folder_of(training_of(job)) / "slurm" / digest


def write_submission(job: JobConfig, folder: Path) -> None:
    """Its script, and its config: unmasked, since the job needs every value, so only its owner may
    read it.
    """
    path, script = folder / "local" / "job.yaml", render(job)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(  # of mode 0600
            "w", encoding="utf-8", dir=path.parent, prefix=".", delete=False
        ) as file:
            file.write(config_text(job))
        os.replace(file.name, path)
        (folder / SCRIPT).write_text(script, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"run.root: {folder} cannot be written ({error.strerror}); choose another"
        ) from None


WINS: dict[str, tuple[str, ...]] = {
    "": ("ARRAY_INX", "ERROR", "JOB_NAME", "NO_REQUEUE", "OPEN_MODE", "OUTPUT", "REQUEUE",
         "SIGNAL"),
    "account": ("ACCOUNT",), "partition": ("PARTITION",), "time": ("TIMELIMIT",),
    "mem": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "gpus-per-node": ("GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK"),
}  # fmt: skip
"""Variables of sbatch, SBATCH_ left out, that would win over an option of a script's header; the
first ones over what each of ours has.
"""
OF_THE_CLUSTER = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS"}
"""Not of an outer job, but of where and as whom to submit."""


def submit(path: Path) -> str:
    """Hand a script to sbatch; returns the job's number.

    Without what an outer job has in its environment, which would come along as if it were this
    one's, and what would win there over the script's header.
    """
    asked = set(re.findall(r"^#SBATCH --([a-z-]+)", path.read_text(encoding="utf-8"), re.M))
    wins = {f"SBATCH_{name}" for option in {"", *asked} for name in WINS.get(option, ())}
    unused = sorted(wins & os.environ.keys())
    if unused:
        print(f"slurm: not used, as the config says what to ask for: {', '.join(unused)}")
    outer = {k for k in os.environ if k.startswith("SLURM_") and k not in OF_THE_CLUSTER}
    ours = {k: v for k, v in os.environ.items() if k not in wins | outer}
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False,
            timeout=ANSWER_SECONDS, env=ours,
        )  # fmt: skip
    except FileNotFoundError:
        raise RefusedError(
            "launch=slurm: no sbatch on this machine; run it on a login node"
        ) from None
    except subprocess.TimeoutExpired:
        raise RefusedError(
            f"launch=slurm: sbatch did not answer in {ANSWER_SECONDS} s, and the job may be "
            "submitted all the same; look at squeue before you give the command again"
        ) from None
    if done.returncode:
        raise RefusedError(f"launch=slurm: sbatch refused it: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def follow(number: str, folder: Path) -> int:
    """Copy the output of a job of the run in `folder` here until it is over, through requeues;
    returns its exit code. Ctrl-C ends the command, not the job.
    """
    output, shown = output_of(folder, number), 0
    try:
        while True:
            state, code = state_of(number)
            if output.exists():
                with output.open("rb") as file:
                    file.seek(shown)
                    text = file.read()
                shown += len(text)
                sys.stdout.write(text.decode(errors="replace"))
                sys.stdout.flush()
            if (state, code) == ("COMPLETED", DONE) or (state == "FAILED" and code in CODES):
                print(f"slurm: job {number} is {state}, exit {code}", flush=True)
                return code
            if state in OVER:  # by Slurm: a signal's number, or a code of the script's last moments
                return code_of_run(number, f"is {state}", folder)
            if state == FORGOTTEN:
                said = "is over, and slurmctld has forgotten how it ended"
                return code_of_run(number, said, folder)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print(f"\nslurm: job {number} goes on; its output is in {output}", flush=True)
        raise


def code_of_run(number: str, became: str, folder: Path) -> int:
    """The exit code by run.json, where nobody knows one of the job's; `became` says how that ended.

    What another job of the run has written there says nothing of this one.
    """
    facts = recorded(folder)
    jobs = [attempt.get("job") for attempt in facts.get("attempts", [])]
    state = facts["state"] if jobs[-1:] == [number] else "nothing of it"
    code = {"done": DONE, "stopped": STOPPED}.get(state, TRAINING)
    print(
        f"slurm: job {number} {became}; {folder}/run.json says {state}, exit {code}; the same "
        f"command with run.id={folder.name} resumes what is not done",
        flush=True,
    )
    return code


def state_of(number: str) -> tuple[str, int]:
    """A job's state and exit code, as scontrol tells; a controller that is away says UNKNOWN."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", "-o", number], capture_output=True, text=True,
            check=False, timeout=ANSWER_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "UNKNOWN", 0
    if "Invalid job id" in done.stderr:
        return FORGOTTEN, 0
    facts = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    return facts.get("JobState", "UNKNOWN"), int(facts.get("ExitCode", "0:0").split(":")[0])


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tuneloom.launch", "."), undefined=StrictUndefined, trim_blocks=True,
        keep_trailing_newline=True, comment_start_string="{##", autoescape=False,
    )  # fmt: skip
    return environment.get_template("finetune.sbatch.jinja")


if __name__ == "__main__":
    print(render_default(), end="")
