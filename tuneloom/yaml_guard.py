"""YAML from outside is measured before it is parsed: bytes, depth, and what its aliases unfold to.

OmegaConf was still unfolding a 442-byte bomb after 20 s (2.3.1, measured).
"""

from pathlib import Path
from typing import Any

import yaml

from tuneloom.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_NODES = 20_000
"""Values after aliases are unfolded; the largest config of ours has 200."""
MAX_DEPTH = 64


def check_file(path: Path) -> None:
    """Raises ConfigError when `path` is too large, too deep, or unfolds to too much."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ConfigError(f"{path}: {size} bytes of YAML, at most {MAX_BYTES} are read; split it")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        _measure_events(text, path)
        root = yaml.compose(text, Loader=yaml.CSafeLoader)
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{path}: not YAML ({first})") from None
    if root is not None and unfolded(root, path=path) > MAX_NODES:
        raise ConfigError(
            f"{path}: unfolds to more than {MAX_NODES} values by its aliases; write them out"
        )


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


def check_folder(folder: Path) -> None:
    """`check_file` for every YAML file that Hydra could pick below `folder`."""
    for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        check_file(path)


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
