"""The command `tuneloom VERB [overrides]`: compose, validate, run one verb, end with its exit code.

Hydra's own flags that print (--help, --cfg, --info) and its tab completion go to Hydra; an ordinary
call, and each point of a --multirun, composes in process, makes no output folder and changes no
directory.
"""

import importlib
import logging
import os
import sys
import warnings
from types import ModuleType

from tuneloom.config import (
    Config,
    build,
    compose,
    composed,
    did_you_mean,
    dotted_keys,
    points,
    unknown_override,
)
from tuneloom.errors import CONFIGURATION, DONE, STOPPED, ConfigError, Stopped, TuneloomError
from tuneloom.imports import unswept
from tuneloom.redact import redact, redact_tracebacks
from tuneloom.train.signals import HEARD

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
COMPLETION = ("install=bash", "uninstall=bash", "query=bash")
"""Behind `-sc`, as Hydra names it."""
PRINTING = ("--help", "--hydra-help", "--cfg", "-c", "--info", "-i")
BESIDE = ("--package", "-p", "--resolve")
VALUED = ("--cfg", "-c", "--info", "-i", "--package", "-p")
SWEEP = ("--multirun", "-m")
UNGUARDED = ("--config-path", "-cp", "--config-name", "-cn")

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
    redact_tracebacks()
    try:
        if verb in ("-sc", "--shell-completion"):
            return complete(rest)
        if verb not in VERBS:
            raise ConfigError(
                f"verb: expected one of {', '.join(VERBS)}, got {verb!r}"
                f"{did_you_mean(verb, list(VERBS))}"
            )
        if any(a.split("=")[0] in PRINTING for a in rest):
            if any(a in SWEEP for a in rest):
                raise ConfigError(
                    "--multirun: what prints shows one config; leave out --multirun and give each "
                    "key one value"
                )
            return run_under_hydra(verb, rest)
        if any(a in SWEEP for a in rest):
            return sweep(verb, [a for a in rest if a not in SWEEP])
        return run(verb, rest)
    except TuneloomError as error:
        return failed(verb, error)
    except KeyboardInterrupt:
        print(f"tuneloom {verb}: interrupted", file=sys.stderr)
        return 130


def usage() -> str:
    """The list of verbs."""
    wide = max(map(len, VERBS)) + 2
    lines = [f"  {verb:<{wide}}{text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        ["usage: tuneloom VERB [group=choice] [dotted.key=value]", "", *lines, "",
         "tuneloom VERB --help shows its groups and keys; --cfg job prints the composed config.",
         'Tab completion in bash: eval "$(tuneloom -sc install=bash)"']
    )  # fmt: skip


def failed(verb: str, error: TuneloomError) -> int:
    """Say what went wrong, without the secrets in it; returns the exit code."""
    print(f"tuneloom {verb}: {redact(str(error))}", file=sys.stderr)
    return error.exit_code


def run(verb: str, rest: list[str]) -> int:
    """Compose, validate and run in this process."""
    module, config = config_of(verb, rest)
    return int(module.main(config))


def sweep(verb: str, rest: list[str]) -> int:
    """Every point, one after the other, once all are valid, then a line on each; returns the worst
    exit code. A point that is sent a signal is the last to start, also when it could still end; the
    code is then that of a stop, whatever failed before, since the same command goes on.

    Not by Hydra's sweeper: it would call what a config names in hydra.callbacks or its logging.
    """
    config_dir, overrides = split_config_dir(rest)
    where = ["--config-dir", config_dir] if config_dir else []
    keys = getattr(importlib.import_module(VERBS[verb][0]), "TEXT_KEYS", ())
    texts = [o for o in overrides if o.partition("=")[0] in keys]
    swept = points([o for o in overrides if o not in texts])
    jobs = apart(verb, [*where, *texts], swept)
    codes: list[int] = []
    ends: list[str] = []
    stopped = False
    HEARD.clear()
    for module, config in jobs:
        if HEARD:
            said = "stopped on a signal between two points; the same command goes on with the next"
            failed(verb, Stopped(said))
            stopped = True
            break
        try:
            code, end = ended(verb, module, config)
        except Stopped as error:
            failed(verb, error)
            ends.append(f"exit {STOPPED}, {redact(str(error))}")
            stopped = True
            break
        codes.append(code)
        ends.append(end)
    ends += ["not started"] * (len(jobs) - len(ends))
    for name, end in zip(names(swept), ends, strict=True):
        print(f"tuneloom {verb}: {name}: {end}", file=sys.stderr)
    return STOPPED if stopped else worst(codes)


def ended(verb: str, module: ModuleType, config: Config) -> tuple[int, str]:
    """Run a point of a sweep; its exit code, and how it ended in words. No error of it keeps the
    next one from running, but for Stopped, which is raised.
    """
    try:
        code = int(module.main(config))
    except Stopped:
        raise
    except TuneloomError as error:
        return failed(verb, error), f"exit {error.exit_code}, {redact(str(error))}"
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1, f"exit 1, {type(error).__name__}"
    return code, f"exit {code}" if code else "done"


def apart(verb: str, given: list[str], swept: list[list[str]]) -> list[tuple[ModuleType, Config]]:
    """Each point with a run of its own: where several have one run.id, they get their numbers, so
    the same command finds the same runs again.
    """
    jobs = [config_of(verb, [*given, *point]) for point in swept]
    ids = [getattr(getattr(config, "run", None), "id", None) for _, config in jobs]
    for number, run_id in enumerate(ids):
        if run_id is not None and ids.count(run_id) > 1:
            swept[number] = [*swept[number], f"run.id={run_id}-{number}"]
            jobs[number] = config_of(verb, [*given, *swept[number]])
    return jobs


def names(swept: list[list[str]]) -> list[str]:
    """The points of a sweep, each by the overrides that not all of its points share."""
    shared = set.intersection(*map(set, swept))
    return [redact(" ".join(o for o in point if o not in shared) or "all") for point in swept]


def worst(codes: list[int]) -> int:
    """The gravest of some exit codes: a failure, of several the highest, then a stop, then none."""
    failures = [code for code in codes if code not in (DONE, STOPPED)]
    return max(failures or codes)


def config_of(verb: str, rest: list[str]) -> tuple[ModuleType, Config]:
    """The module of a verb, and the config that the arguments make."""
    config_dir, overrides = split_config_dir(rest)
    with unswept():
        module = importlib.import_module(VERBS[verb][0])
        known = list(dotted_keys(module.CONFIG))
        unknown_override(overrides, known)
        texts, overrides = take_texts(overrides, getattr(module, "TEXT_KEYS", ()))
        mapping = compose(verb, overrides, config_dir=config_dir, known=known)
    return module, build(module.CONFIG, mapping | texts)


def take_texts(overrides: list[str], keys: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Overrides of `keys` as they were typed: a prompt may hold what Hydra's grammar forbids."""
    texts, others = {}, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in keys or value == "null":
            others.append(override)
        elif (
            len(value) > 1
            and value[0] == value[-1]
            and value[0] in "'\""
            and (value[0] not in value[1:-1])
        ):
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
        elif argument.split("=")[0] in UNGUARDED:
            raise ConfigError(
                f"{argument.split('=')[0]}: a verb reads its own config; put yours into a folder, "
                "and name that by --config-dir"
            )
        elif argument.startswith("-"):
            raise ConfigError(
                f"{argument}: unknown flag; keys are written key=value, without dashes"
            )
        else:
            overrides.append(argument)
    if pending or (config_dir and not os.path.isdir(config_dir)):
        raise ConfigError(f"--config-dir: expected an existing folder, got {config_dir!r}")
    return os.path.abspath(config_dir) if config_dir else None, overrides


def run_under_hydra(verb: str, rest: list[str]) -> int:
    """Hydra's flags that print; the config is composed and looked at before Hydra does it again."""
    config_dir, overrides = split_config_dir(without_printing(rest))
    composed(verb, overrides, config_dir=config_dir)
    hydra_prints(verb, f"tuneloom {verb}", rest)
    return 0


def complete(rest: list[str]) -> int:
    """Tab completion by Hydra: verbs, then the groups and keys of the one in COMP_LINE."""
    if len(rest) != 1 or rest[0] not in COMPLETION:
        raise ConfigError(f"-sc: expected one of {', '.join(COMPLETION)}, got {' '.join(rest)!r}")
    verb = "train"
    if rest[0].startswith("query="):
        name, _, after = os.environ.get("COMP_LINE", "").partition(" ")
        verb, ended, keys = after.lstrip().partition(" ")
        if not ended:
            print(" ".join(known for known in VERBS if known.startswith(verb)))
        if not ended or verb not in VERBS:
            return 0
        os.environ["COMP_LINE"] = f"{name} {keys}"
    hydra_prints(verb, "tuneloom", ["-sc", *rest])
    return 0


def hydra_prints(verb: str, name: str, arguments: list[str]) -> None:
    """Hydra's own command line, as the program `name`, on the config of a verb."""
    import hydra

    def never(_: object) -> None:
        raise AssertionError(f"Hydra ran what was to be printed: {arguments}")

    sys.argv = [name, *arguments]
    os.environ.setdefault("HYDRA_FULL_ERROR", "0")
    hydra.main(version_base="1.3", config_path="pkg://tuneloom.conf", config_name=verb)(never)()


def without_printing(rest: list[str]) -> list[str]:
    """The arguments without the flags that print, and their values."""
    kept = []
    for previous, argument in zip(["", *rest], rest, strict=False):
        flag = argument.split("=")[0] in (*PRINTING, *BESIDE)
        if not flag and not (previous in VALUED and "=" not in argument):
            kept.append(argument)
    return kept
