"""Hydra composes, pydantic validates: from overrides to one frozen, typed config, or a ConfigError.

`compose(verb, overrides)` gives the plain mapping; `build(model, mapping)` gives the frozen model.
Every fault comes back as one sentence that starts with the dotted key.
"""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tuneloom.errors import ConfigError

FORBIDDEN_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


class Config(BaseModel):
    """Base of every config: frozen, no unknown keys, no silent type coercion of strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


C = TypeVar("C", bound=Config)


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


def did_you_mean(key: str, known: list[str]) -> str:
    """`; did you mean 'optim.lr'?`, or nothing when no known key is near."""
    known = [k for k in known if not any(other.startswith(k + ".") for other in known)]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not near:
        last = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [last[n] for n in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1)]
    return f"; did you mean {near[0]!r}?" if near else ""


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
        return f"{key}: {message}, got {error['input']!r}" if key else message
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


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
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    if config_dir:
        from tuneloom.yaml_guard import check_folder

        check_folder(Path(config_dir))
    # The flag takes the place of the search path that conf/ingest.yaml names.
    own = ",pkg://tuneloom.conf.ingest" if verb == "ingest" else ""
    search = [f"hydra.searchpath=[file://{config_dir}{own}]"] if config_dir else []
    try:
        with initialize_config_module(config_module="tuneloom.conf", version_base="1.3"):
            composed = hydra_compose(config_name=verb, overrides=[*search, *overrides])
        container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_hydra_sentence(error, known or [])) from None
    return typing.cast(dict[str, Any], container)


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
