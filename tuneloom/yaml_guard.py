"""YAML from outside is measured before it is parsed: bytes, depth, what its aliases and its
interpolations unfold to; and it names no code.

OmegaConf was still unfolding a 442-byte bomb after 20 s (2.3.1, measured).
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tuneloom.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_NODES = 20_000
"""Values after aliases are unfolded; the largest config of ours has 200."""
MAX_DEPTH = 64
MAX_RESOLVED = 4 * 2**20
"""Characters of a config once its interpolations are resolved, at worst."""
FORBIDDEN_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
"""Keys by which Hydra instantiates what a config names (CVE-2026-68508)."""
OC_ENV = re.compile(r"\$\{\s*oc\.env\s*:([^,}]*)")
SECRET_NAME = re.compile(
    r"(?i)(?:^|_)(?:\w*(?:token|secret|(?:api|access|private)_?key|credential|passw\w*|passphrase"
    r"|pseudonym)s?\d*|keys?|pass|(?<=_)pwd|auth)(?:_|$)(?!(?:\w*_)?(?:path|file|mode|sock)$)"
)
"""Of variables that hold secrets, whatever their value; a tokenizer is none, nor a file's name."""
CODE_KEYS = {*FORBIDDEN_KEYS, "()"}
"""And the one by which `logging.config.dictConfig` does."""


def check_file(path: Path) -> None:
    """Raises ConfigError when `path` is too large, too deep, or unfolds to too much."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(
                f"{path}: {size} bytes of YAML, at most {MAX_BYTES} are read; split it"
            )
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); put it back, or remove the name"
        ) from None
    try:
        _measure_events(text, path)
        root = yaml.compose(text, Loader=yaml.CSafeLoader)
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{path}: not YAML ({first})") from None
    if root is None:
        return
    if unfolded(root, path=path) > MAX_NODES:
        raise ConfigError(
            f"{path}: unfolds to more than {MAX_NODES} values by its aliases; write them out"
        )
    _refuse_code(root, path)
    for scalar in _scalars(root):
        for name in OC_ENV.findall(str(scalar.value)):
            name = name.strip(" \t'\"")
            if not re.fullmatch(r"\w+", name) or SECRET_NAME.search(name):
                raise ConfigError(
                    f"{path}, line {scalar.start_mark.line + 1}: {name}: a config takes no "
                    "secret from the environment; programs read those that they need"
                )


def _refuse_code(root: Any, path: Path) -> None:
    """No key at any depth names code, and no default lies outside the folder."""
    for key, value in _pairs(root):
        line = key.start_mark.line + 1
        if set(str(key.value).split(".")) & CODE_KEYS:
            raise ConfigError(
                f"{path}, line {line}: {key.value}: configs name no code here; remove the key"
            )
        if key.value == "defaults" and any(".." in str(s.value) for s in _scalars(value)):
            raise ConfigError(
                f"{path}, line {line}: defaults: a choice is the name of a file in its group; "
                "write no '..'"
            )


def _pairs(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(node, yaml.MappingNode):
        yield from node.value
    for child in _children(node):
        yield from _pairs(child)


def _scalars(node: Any) -> Iterator[Any]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    for child in _children(node):
        yield from _scalars(child)


def _measure_events(text: str, path: Path) -> None:
    """Depth and length as the parser goes, before anything that recurses sees the text."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.CSafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or count > 2 * MAX_NODES:
            raise ConfigError(
                f"{path}: nested deeper than {MAX_DEPTH}, or more than {MAX_NODES} values"
            )


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, once `check_file` has passed it."""
    check_file(path)
    content = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, got {content!r:.80}")
    return content


def check_folder(folder: Path) -> None:
    """`check_file` for every YAML file that Hydra could pick below `folder`, behind links too."""
    seen: set[Path] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := Path(place).resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(files):
            if name.endswith((".yaml", ".yml")):
                check_file(Path(place, name))


def check_interpolations(text: str) -> None:
    """Raises ConfigError where the interpolations of a composed config, written as YAML, may
    resolve to too much: n of them can refer to each other so that one value comes 3^(n/3) times.
    """
    count = len(re.findall(r"\$\{", text))
    if len(text) * 3 ** min(count / 3, 64) > MAX_RESOLVED:
        raise ConfigError(
            f"config: its {count} interpolations (${{...}}) may resolve to more than "
            f"{MAX_RESOLVED >> 20} MiB; write the values out"
        )


def unfolded(node: Any, *, path: Path) -> int:
    """Values that a node graph stands for when each alias is written out; exact, in one pass."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: Any) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise ConfigError(f"{path}: an alias stands inside what it names; write it out")
        open_nodes.add(id(node))
        total = 1 + sum(size(child) for child in _children(node))
        open_nodes.discard(id(node))
        sizes[id(node)] = total
        return total

    return size(node)


def _children(node: Any) -> list[Any]:
    """Items of a sequence; keys and values of a mapping."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
