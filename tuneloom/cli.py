"""The command `tuneloom VERB [overrides]`: compose, validate, run one verb, end with its exit code.

Hydra's own flags (--help, --cfg, --info, --multirun, --shell-completion) go to Hydra; an ordinary
call composes in process, makes no output folder and changes no directory.
"""

import importlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from tuneloom.config import FORBIDDEN_KEYS, build, compose, dotted_keys, unknown_override
from tuneloom.errors import CONFIGURATION, ConfigError, TuneloomError
from tuneloom.imports import unswept

VERBS = {
    "doctor": (
        "tuneloom.launch.doctor",
        "Is this machine fit to train? One line each, with the fix.",
    ),
    "ingest": ("tuneloom.launch.ingest", "Raw records into a versioned dataset."),
    "inspect": ("tuneloom.data.inspect", "Rows as the trainer sees them, mask in colour."),
    "plan": ("tuneloom.launch.plan", "Memory, steps, disk and time, before anything starts."),
    "train": ("tuneloom.launch.run", "Fine-tune or pretrain."),
    "export": ("tuneloom.train.export", "A run's adapter or merged model, with its contract."),
    "generate": ("tuneloom.evals.generate", "Answer a prompt with a base and an adapter."),
    "evaluate": ("tuneloom.evals.runner", "Base against tuned on rows neither saw."),
    "report": ("tuneloom.evals.report", "One self-contained report.html for a run."),
    "mix": ("tuneloom.data.mix", "One dataset out of several, by weight, epochs and rehearsal."),
    "synthesise": (
        "tuneloom.data.synthesise",
        "Rows written by a teacher model, each on the record.",
    ),
    "golden": ("tuneloom.data.review", "Rows that people vouch for: propose, decide, seal."),
    "lineage": ("tuneloom.registry.lineage", "Rows to models, and models back to rows."),
    "erase": ("tuneloom.data.erase", "Rows out of datasets and models: plan, then do it."),
}
HYDRA_FLAGS = (
    "--help", "--hydra-help", "--cfg", "-c", "--info", "-i", "--multirun", "-m", "--package", "-p",
    "--resolve", "--shell-completion", "-sc", "--config-path", "-cp", "--config-name", "-cn",
)  # fmt: skip

# Nothing phones home unless asked.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Said on every load, and nothing a user can act on: a missing bitsandbytes kernel, PEFT's own call.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code of the contract."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else CONFIGURATION
    verb, *rest = arguments
    try:
        if verb not in VERBS:
            raise ConfigError(f"verb: expected one of {', '.join(VERBS)}, got {verb!r}")
        if any(a.split("=")[0] in HYDRA_FLAGS for a in rest):
            return run_under_hydra(verb, rest)
        return run(verb, rest)
    except TuneloomError as error:
        from tuneloom.redact import redact

        print(f"tuneloom {verb}: {redact(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"tuneloom {verb}: interrupted", file=sys.stderr)
        return 130


def usage() -> str:
    """The list of verbs."""
    lines = [f"  {verb:<10}{text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        ["usage: tuneloom VERB [group=choice] [dotted.key=value]", "", *lines, "",
         "tuneloom VERB --help shows its groups and keys; --cfg job prints the composed config."]
    )  # fmt: skip


def run(verb: str, rest: list[str]) -> int:
    """Compose, validate and run in this process."""
    config_dir, overrides = split_config_dir(rest)
    with unswept():
        module = importlib.import_module(VERBS[verb][0])
        known = list(dotted_keys(module.CONFIG))
        unknown_override(overrides, known)
        texts, overrides = take_texts(overrides, getattr(module, "TEXT_KEYS", ()))
        mapping = compose(verb, overrides, config_dir=config_dir, known=known)
    return int(module.main(build(module.CONFIG, mapping | texts)))


def take_texts(overrides: list[str], keys: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Overrides of `keys` as they were typed: a prompt may hold what Hydra's grammar forbids."""
    texts, others = {}, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in keys or value == "null":
            others.append(override)
        elif len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            texts[key] = value[1:-1]
        else:
            texts[key] = value
    return texts, others


def split_config_dir(rest: list[str]) -> tuple[str | None, list[str]]:
    """`--config-dir X` or `--config-dir=X` out of the arguments; other flags are refused."""
    config_dir, overrides, pending = None, [], False
    for argument in rest:
        if pending:
            config_dir, pending = argument, False
        elif argument in ("--config-dir", "-cd"):
            pending = True
        elif argument.startswith("--config-dir="):
            config_dir = argument.split("=", 1)[1]
        elif argument.startswith("--"):
            raise ConfigError(
                f"{argument}: unknown flag; keys are written key=value, without dashes"
            )
        else:
            overrides.append(argument)
    if pending or (config_dir and not os.path.isdir(config_dir)):
        raise ConfigError(f"--config-dir: expected an existing folder, got {config_dir!r}")
    return os.path.abspath(config_dir) if config_dir else None, overrides


def run_under_hydra(verb: str, rest: list[str]) -> int:
    """Hydra's own flags, sweeps and completion; each job of a sweep runs as an ordinary call
    would.
    """
    import hydra
    from omegaconf import DictConfig, OmegaConf

    refuse_code(rest)
    worst = 0

    def task(composed: DictConfig) -> None:
        nonlocal worst
        mapping: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        module = importlib.import_module(VERBS[verb][0])
        worst = max(worst, int(module.main(build(module.CONFIG, mapping))))

    sys.argv = [f"tuneloom {verb}", *rest]
    os.environ.setdefault("HYDRA_FULL_ERROR", "0")
    hydra.main(version_base="1.3", config_path="pkg://tuneloom.conf", config_name=verb)(task)()
    return worst


def refuse_code(arguments: list[str]) -> None:
    """Hydra instantiates its own sweeper and launcher: no argument may name their class
    (CVE-2026-68508), and no file of a config folder may unfold to more than it is.
    """
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        key, _, value = argument.partition("=")
        if set(key.lstrip("+~").split(".")) & set(FORBIDDEN_KEYS):
            raise ConfigError(f"{key}: configs name no code here; remove it")
        if key in ("--config-dir", "-cd"):
            from tuneloom.yaml_guard import check_folder

            check_folder(Path(value or following))
