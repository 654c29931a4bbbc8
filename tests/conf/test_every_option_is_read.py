"""An option that no code reads is a lie: every field of every verb's config is read somewhere."""

import ast
import importlib
from pathlib import Path

import pytest

from tuneloom.cli import VERBS
from tuneloom.config import dotted_keys

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("train", "launch", "kernels", "tuneloom")


def read_attributes() -> set[str]:
    """Every `.name` that code loads, and every keyword it passes on by name."""
    names = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    names.add(node.attr)
    return names


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_a_verb_is_read_by_code(verb: str) -> None:
    read = read_attributes()
    keys = dotted_keys(importlib.import_module(VERBS[verb][0]).CONFIG)
    assert [key for key in keys if key.rsplit(".", 1)[-1] not in read] == []
