"""Adapter and model folders on disk: which of the two a folder is, and what it says of itself."""

import json
from dataclasses import dataclass
from pathlib import Path

from tuneloom.errors import ConfigError, DataError
from tuneloom.registry.contract import Contract, read

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter folder: what it says of itself, without its tensors."""

    folder: Path
    rank: int
    alpha: int
    targets: tuple[str, ...]
    base: str
    """What adapter_config.json names as the base: a path or hub id, unchecked."""
    contract: Contract | None


def is_adapter(folder: str | Path) -> bool:
    """True for a folder with adapter_config.json."""
    return Path(folder, ADAPTER_CONFIG).exists()


def is_model(folder: str | Path) -> bool:
    """True for a folder with config.json and no adapter_config.json."""
    return Path(folder, MODEL_CONFIG).exists() and not is_adapter(folder)


def open_adapter(folder: str | Path) -> Adapter:
    """What an adapter folder says of itself; raises ConfigError or DataError for anything else."""
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"adapter: no folder {path}; give one that `tuneloom export` wrote")
    if not is_adapter(path):
        kind = "a whole model" if is_model(path) else f"no {ADAPTER_CONFIG}"
        raise ConfigError(f"adapter: {path} holds {kind}; give an adapter folder")
    try:
        config = json.loads(Path(path, ADAPTER_CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path / ADAPTER_CONFIG}: not valid JSON ({error})") from error
    targets = config.get("target_modules") or []
    return Adapter(
        folder=path,
        rank=int(config.get("r", 0)),
        alpha=int(config.get("lora_alpha", 0)),
        targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        base=str(config.get("base_model_name_or_path") or ""),
        contract=read(path),
    )


def model_folder(path: str, *, revision: str | None = None, key: str = "model.path") -> Path:
    """The local folder of a base: the path itself, or a hub id's snapshot (fetched when missing).

    Raises ConfigError for an adapter in place of a base, and for what is neither folder nor hub id.
    """
    folder = Path(path)
    if is_adapter(folder):
        raise ConfigError(
            f"{key}: {path} is an adapter, not a base; give its base here, and it as adapter="
        )
    if is_model(folder):
        described = Path(folder, MODEL_CONFIG).read_text("utf-8")
        if '"transformers_weights"' in described:  # it may be pickled, and goes before safetensors
            raise ConfigError(
                f"{key}: {folder / MODEL_CONFIG} names a weights file of its own "
                "(transformers_weights); remove the key"
            )
        return folder
    if folder.is_dir():
        raise ConfigError(f"{key}: {path} has no {MODEL_CONFIG}; give a Hugging Face model folder")
    return _snapshot(path, revision, key)


def _snapshot(path: str, revision: str | None, key: str) -> Path:
    """A hub id's files on this machine; ConfigError says what kept them away."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=["consolidated*", "original/*"],
            )
        )
    except HFValidationError:
        raise ConfigError(f"{key}: no folder {path}, and it is no hub id either") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0][:160]
        raise ConfigError(
            f"{key}: no folder {path}, and the hub gave no such model ({reason}); "
            "give a folder, or check the id, the network and HF_TOKEN"
        ) from error
