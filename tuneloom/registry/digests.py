"""What a model, tokenizer or template is: sha256 strings that survive sharding and saving again.

A weights digest covers tensor names, dtypes, shapes and bytes, never file names, shard borders or
file metadata: the same weights in one file or in twenty have one digest. No torch: the safetensors
header is read by hand and the bytes are hashed from a memory map, tensors in parallel.
"""

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tuneloom.errors import DataError

INDEX = "model.safetensors.index.json"
NONE = "none"
"""Digest of what is not there, such as the template of a tokenizer without one."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file: its name, its type, and where its bytes lie."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def canonical(value: Any) -> bytes:
    """JSON with one spelling: sorted keys, no spaces, Unicode as it is."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files that a loader would read; raises DataError when there are none.

    Of an adapter that is the one PEFT reads. transformers takes `model.safetensors` before an
    index, and either after other names (5.23), so a folder that holds several sets is refused: a
    digest must be of what runs. Second copies under names that no loader asks for do not count.
    """
    adapter, whole, index = (
        Path(folder, name) for name in ("adapter_model.safetensors", "model.safetensors", INDEX)
    )
    if Path(folder, "adapter_config.json").exists():
        if not adapter.exists():  # PEFT would unpickle adapter_model.bin
            raise DataError(f"{folder}: no {adapter.name}; save the adapter as safetensors")
        return [adapter]
    others = [*Path(folder).glob("shard-*.safetensors"), *([whole] if whole.exists() else [])]
    if index.exists():
        named = [_named(index, name) for name in sorted(set(_json(index)["weight_map"].values()))]
        if (more := set(others) - set(named)) or (whole in named and len(named) > 1):
            extra = min(more or {whole}).name
            raise DataError(
                f"{folder}: holds {extra} beside {INDEX}, and readers differ in which they take; "
                "remove one"
            )
        return named
    if others == [whole]:
        return others
    raise DataError(f"{folder}: expected *.safetensors weights, found none; save as safetensors")


def _named(index: Path, name: str) -> Path:
    """A file that an index names."""
    file = index.with_name(Path(name).name)
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise DataError(f"{index}: names {name!r}, which is no safetensors file beside it")
    if not file.is_file():
        raise DataError(f"{file}: not there, though {index.name} names it; copy it again")
    return file


def tensors(file: Path) -> Iterator[Tensor]:
    """The tensors a safetensors file says it holds; raises DataError for a damaged file."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8)) if size >= 8 else (size,)
        if size < 8 + length:
            raise DataError(f"{file}: cut short at {size} bytes; copy it again")
        try:
            header = json.loads(handle.read(length))
        except ValueError as error:
            raise DataError(f"{file}: not a safetensors file; copy it again") from error
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size:
            raise DataError(f"{file}: {name} is cut short; copy the file again")
        yield Tensor(file, name, entry["dtype"], tuple(entry["shape"]), start, end)


def weights_digest(folder: str | Path) -> str:
    """Digest of all tensors of a folder, the same however they are sharded."""
    everything = [tensor for file in weight_files(folder) for tensor in tensors(file)]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(_bytes_hash, everything))
    lines = sorted(
        f"{t.name}\t{t.dtype}\t{list(t.shape)}\t{h}"
        for t, h in zip(everything, hashes, strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _bytes_hash(tensor: Tensor) -> str:
    """sha256 of one tensor's bytes; hashlib lets go of the GIL, so threads run side by side."""
    if tensor.start == tensor.end:
        return hashlib.sha256(b"").hexdigest()
    with (
        tensor.file.open("rb") as handle,
        mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
        view[tensor.start : tensor.end] as part,
    ):
        return hashlib.sha256(part).hexdigest()


def non_finite(folder: str | Path) -> list[str]:
    """Names of float tensors that hold a NaN or an infinity."""
    return [t.name for f in weight_files(folder) for t in tensors(f) if not _finite(t)]


def _finite(tensor: Tensor) -> bool:
    """False when any value has an exponent of all ones; other types than these are not floats."""
    layout = {"F32": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)}
    if tensor.dtype not in layout or tensor.start == tensor.end:
        return True
    unit, exponent = layout[tensor.dtype]
    count = (tensor.end - tensor.start) // np.dtype(unit).itemsize
    bits = np.memmap(tensor.file, dtype=unit, mode="r", offset=tensor.start, shape=(count,))
    step = 1 << 24  # 16 M values at a time: no copy of a whole embedding
    parts = (bits[i : i + step] for i in range(0, count, step))
    return not any(bool(((part & exponent) == exponent).any()) for part in parts)


def tokenizer_digest(folder: str | Path) -> str:
    """Digest of how a folder's tokenizer makes ids of text; padding and truncation left out."""
    path = Path(folder, "tokenizer.json")
    if path.exists():
        tokenizer = _json(path)
        return digest_of({k: v for k, v in tokenizer.items() if k not in ("padding", "truncation")})
    slow = Path(folder, "tokenizer.model")
    if slow.exists():
        return hashlib.sha256(slow.read_bytes()).hexdigest()
    raise DataError(f"{folder}: expected tokenizer.json or tokenizer.model, found neither")


def template_digest(folder: str | Path) -> str:
    """Digest of a folder's chat template, in whichever of its two places; `none` without one."""
    loose = Path(folder, "chat_template.jinja")
    if loose.exists():
        return hashlib.sha256(loose.read_bytes()).hexdigest()
    path = Path(folder, "tokenizer_config.json")
    template = _json(path).get("chat_template") if path.exists() else None
    if template is None:
        return NONE
    text = template if isinstance(template, str) else canonical(template).decode()
    return hashlib.sha256(text.encode()).hexdigest()


def _json(path: Path) -> Any:
    """A JSON file, or a DataError that names it."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); copy it again") from error
