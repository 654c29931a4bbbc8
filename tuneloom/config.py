"""Hydra composes, pydantic validates: from overrides to one frozen, typed config, or a ConfigError.

`compose(verb, overrides)` gives the plain mapping; `build(model, mapping)` gives the frozen model.
Every fault comes back as one sentence that starts with the dotted key.
"""

import difflib
import itertools
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from tuneloom.errors import ConfigError
from tuneloom.yaml_guard import FORBIDDEN_KEYS, check_folder, check_interpolations

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = Path(__file__).parent / "conf"
PER_CALL = ("job", "overrides", "runtime", "searchpath")
"""Parts of Hydra's own config that differ from call to call; no file may set another."""


class Config(BaseModel):
    """Base of every config: frozen, no unknown keys, no silent type coercion of strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


C = TypeVar("C", bound=Config)


def _writable(path: str) -> str:
    folder = Path(path).parent
    if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        return path  # a device, or a pipe
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError("expected a file in a folder that exists and can be written to")
    return path


OutFile = Annotated[str, AfterValidator(_writable)]
"""A file to write, whose folder is there before any work is done for it."""


def write_out(path: Path, text: str) -> None:
    """Write a file whole or not at all; what is no plain file, a device or a link, as it stands."""
    if path.exists() and (path.is_symlink() or not path.is_file()):
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key a config of this model may have: `optim`, `optim.lr`, ..."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key
        for nested in _nested_models(field.annotation):
            yield from dotted_keys(nested, f"{key}.")


def _nested_models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models inside an annotation such as `Part`, `Part | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            yield from _nested_models(argument)


ELSEWHERE = {
    "learning_rate": "optim.lr", "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.clip",
    "lr_scheduler_type": "optim.schedule", "lr_scheduler": "optim.schedule",
    "warmup_steps": "optim.warmup_steps", "optimizer": "optim.name",
    "r": "method.rank", "lora_r": "method.rank", "lora_rank": "method.rank",
    "lora_alpha": "method.alpha", "lora_dropout": "method.dropout",
    "target_modules": "method.targets", "lora_target_modules": "method.targets",
    "lora_target": "method.targets", "adapter": "method", "finetuning_type": "method",
    "base_model": "model.path", "model_name_or_path": "model.path", "output_dir": "run.root",
    "gradient_checkpointing": "model.checkpointing", "attn_implementation": "model.attention",
    "bf16": "model.dtype", "fp16": "model.dtype", "torch_dtype": "model.dtype",
    "datasets": "data.path", "dataset": "data.path", "cutoff_len": "batch.max_length",
    "max_seq_length": "batch.max_length", "sequence_len": "batch.max_length",
    "gradient_accumulation_steps": "batch.accumulation", "sample_packing": "batch.packing",
    "per_device_train_batch_size": "batch.tokens", "micro_batch_size": "batch.tokens",
    "num_train_epochs": "epochs", "num_epochs": "epochs", "max_steps": "steps",
    "save_steps": "checkpoint.every", "save_total_limit": "checkpoint.keep",
    "eval_steps": "train.validate_every", "report_to": "tracker",
    "resume_from_checkpoint": "resume", "sequence_parallel_degree": "batch.sequence_parallel",
}  # fmt: skip
"""What TRL, Axolotl and LLaMA-Factory call it."""


def did_you_mean(key: str, known: list[str]) -> str:
    """`; did you mean 'optim.lr'?`, also for another trainer's name of it; where no known key is
    near, those beside it, if any.
    """
    if (ours := ELSEWHERE.get(key.rpartition(".")[2])) in known:
        return f"; did you mean {ours!r}?"
    beside = [k for k in known if "." in key and k.rpartition(".")[0] == key.rpartition(".")[0]]
    if "." in key:
        known = [k for k in known if not any(other.startswith(k + ".") for other in known)]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not near:
        last = {k.rsplit(".", 1)[-1]: k for k in known}
        sure = 0.8 if beside else 0.6  # a name of another group has to be near
        near = [
            last[n] for n in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, 1, cutoff=sure)
        ]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; expected one of {', '.join(beside)}" if beside else ""


def build(model: type[C], mapping: Mapping[str, Any]) -> C:
    """Validate a plain mapping into `model`; raises ConfigError naming key, rule and value."""
    _refuse_code_keys(mapping, "")
    try:
        return model.model_validate(mapping)
    except ValidationError as error:
        known = list(dotted_keys(model))
        raise ConfigError("\n".join(_sentence(e, known) for e in error.errors())) from None


def _refuse_code_keys(value: Any, path: str) -> None:
    """Hydra's instantiation keys name code to run; no config of ours may hold one
    (CVE-2026-68508).
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            here = f"{path}.{key}" if path else str(key)
            if key in FORBIDDEN_KEYS:
                raise ConfigError(f"{here}: configs name no code here; remove the key")
            _refuse_code_keys(inner, here)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _refuse_code_keys(inner, f"{path}[{index}]")


def _sentence(error: Any, known: list[str]) -> str:
    """One pydantic error as `key: rule, got value`."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{did_you_mean(key, known)}"
    if error["type"] == "missing":
        return f"{key}: required, but not given; set {key}=..."
    if error["type"] == "literal_error":
        choices = error["ctx"]["expected"].replace(" or ", ", ")
        return f"{key}: expected one of [{choices}], got {error['input']!r}"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        whole = not key or message.startswith(f"{key}.")  # of a model, which names the key itself
        return message if whole else f"{key}: {message}, got {error['input']!r}"
    out = ""
    if error["type"] == "string_type" and isinstance(error["input"], int | float):
        out = f"; quote a text that reads as a number, the quotes too: '{key}=\"...\"'"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}{out}"


def refuse_code(overrides: list[str]) -> None:
    """Nothing of Hydra's own is set from outside: its config names classes to instantiate
    (CVE-2026-68508), and folders where no file is measured.
    """
    for override in overrides:
        key = override.partition("=")[0]
        words = re.split(r"[^\w]", key)
        if set(words) & set(FORBIDDEN_KEYS):
            raise ConfigError(f"{key}: configs name no code here; remove it")
        if "hydra" in words:
            raise ConfigError(
                f"{key}: nothing of Hydra's own is set here; configs of yours come from a folder, "
                "named by --config-dir"
            )


def points(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of a sweep: every combination of lists (`a=1,2`) and ranges."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    refuse_code(overrides)
    axes = []
    for override in overrides:
        with _in_one_sentence([]):
            parsed = OverridesParser.create().parse_override(override)
        if not parsed.is_sweep_override():
            axes.append([override])
            continue
        try:
            key = parsed.get_key_element()
            axes.append([f"{key}={value}" for value in parsed.sweep_string_iterator()])
        except HydraException:
            raise ConfigError(
                f"{override}: only lists (a=1,2) and range() can be swept; write the values out"
            ) from None
    return [list(point) for point in itertools.product(*axes)]


def compose(
    verb: str,
    overrides: list[str],
    *,
    config_dir: str | None = None,
    known: list[str] | None = None,
) -> dict[str, Any]:
    """Compose `conf/<verb>.yaml` with overrides into a plain, resolved mapping.

    `known` are the dotted keys that a mistyped one is compared with.

    Raises ConfigError for an override Hydra cannot parse or place, and for a `???` left unset.
    """
    from omegaconf import OmegaConf

    content = composed(verb, overrides, config_dir=config_dir, known=known)
    with _in_one_sentence(known or []):
        container = OmegaConf.to_container(content, resolve=True, throw_on_missing=True)
    return typing.cast(dict[str, Any], container)


def composed(
    verb: str,
    overrides: list[str],
    *,
    config_dir: str | None = None,
    known: list[str] | None = None,
) -> "DictConfig":
    """The same before interpolations are resolved, once it is known that they stay small."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf, open_dict

    GlobalHydra.instance().clear()
    refuse_code(overrides)
    _refuse_paths(overrides, config_dir)
    _refuse_no_choice(verb, overrides)
    if config_dir:
        check_folder(Path(config_dir))
    # The flag takes the place of the search path that conf/ingest.yaml names.
    own = ",pkg://tuneloom.conf.ingest" if verb == "ingest" else ""
    search = [f"hydra.searchpath=[file://{config_dir}{own}]"] if config_dir else []
    module = initialize_config_module(config_module="tuneloom.conf", version_base="1.3")
    with _in_one_sentence(known or []), module:
        content = hydra_compose(verb, [*search, *overrides], return_hydra_config=True)
        if config_dir:
            _same_hydra(content.hydra, hydra_compose(verb, [], return_hydra_config=True).hydra)
    with open_dict(content):
        del content["hydra"]
    check_interpolations(OmegaConf.to_yaml(content))
    return content


def _refuse_paths(overrides: list[str], config_dir: str | None) -> None:
    """A choice stays inside its group: Hydra would read any YAML file by its path, unmeasured."""
    folders = [CONF, CONF / "ingest", *([Path(config_dir)] if config_dir else [])]
    for override in overrides:
        key, _, value = override.partition("=")
        group = key.lstrip("+~").split("@")[0]
        if ".." in value and group and any((folder / group).is_dir() for folder in folders):
            raise ConfigError(
                f"{group}: a choice is the name of a file in this group, got {value!r}; put yours "
                "into a folder, and name that by --config-dir"
            )


def _refuse_no_choice(verb: str, overrides: list[str]) -> None:
    """A group of the training config is one of its files: Hydra ends `tracker=null` in a traceback,
    as it does `zero=2`.
    """
    for override in overrides if verb in ("train", "plan") else []:
        group, _, value = override.partition("=")
        if (CONF / group).is_dir() and (value == "null" or value.isdecimal()):
            choices = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
            raise ConfigError(f"{group}: expected one of {choices}, got {value}")


def _same_hydra(content: "DictConfig", stock: "DictConfig") -> None:
    """Hydra's own config is the one it comes with, whatever way a file took to it."""
    from omegaconf import OmegaConf

    ours, theirs = (
        typing.cast(dict[str, Any], OmegaConf.to_container(c, resolve=False))
        for c in (content, stock)
    )
    for part in sorted((set(ours) | set(theirs)) - set(PER_CALL)):
        if ours.get(part) != theirs.get(part):
            raise ConfigError(
                f"hydra.{part}: a file of --config-dir sets it, but nothing of Hydra's own is set "
                "here; remove it"
            )


@contextmanager
def _in_one_sentence(known: list[str]) -> Iterator[None]:
    """What Hydra and OmegaConf raise, as a ConfigError."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_hydra_sentence(error, known)) from None


def unknown_override(overrides: list[str], known: list[str]) -> None:
    """Refuse an override whose key no config has, before Hydra words it; `group=choice` passes.

    Keys are compared whole (`optim.lrr`), so a group such as `experiment` is left to Hydra.
    """
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0].split("@")[0]
        if (
            "." in key
            and not key.startswith("hydra.")
            and key not in known
            and not _is_open(key, known)
        ):
            raise ConfigError(f"{key}: unknown key{did_you_mean(key, known)}, in {override!r}")


def _is_open(key: str, known: list[str]) -> bool:
    """True below a mapping field such as `labels`, whose keys no model lists."""
    parents = [key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1)]
    return any(p in known and not any(k.startswith(p + ".") for k in known) for p in parents)


def _hydra_sentence(error: Exception, known: list[str]) -> str:
    """Hydra's message without its advice to add unknown keys with `+`."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        near = did_you_mean(choice, list(error.options))
        return f"{group}: expected one of {list(error.options)}, got {choice!r}{near}"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: not of the form key=value; a value with brackets, commas or blanks "
            "needs quotes of its own, inside those of the shell"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("To append", "full_key", "object_type"))]
    if kept[0].startswith("Could not override"):
        key = kept[0].split("'")[1]
        if key in known:  # a mapping with entries: Hydra adds none by a whole new one
            return f"{key}: has entries; to add one, write +{key}.NAME=VALUE"
        return f"{key}: unknown key{did_you_mean(key, known)}"
    if kept[0].startswith("Missing mandatory value"):
        missing = [line for line in str(error).splitlines() if "full_key" in line]
        key = missing[0].split(":")[1].strip() if missing else kept[0].split(":")[1].strip()
        return f"{key}: required, but not given; set {key}=..."
    return "; ".join(kept[:3])
