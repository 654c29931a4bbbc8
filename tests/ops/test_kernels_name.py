"""The bare name `kernels` belongs to Hugging Face: transformers executes whatever answers to it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_is_nothing_a_bare_namespace_or_hugging_faces_own() -> None:
    found = importlib.util.find_spec("kernels")
    if found is None or found.origin is None:
        return  # nothing, or a namespace without code
    assert not Path(found.origin).is_relative_to(ROOT / "kernels")
    assert importlib.metadata.version("kernels")


def test_transformers_agrees_with_the_installed_metadata() -> None:
    from transformers.utils import is_kernels_available

    installed = any(d.metadata["Name"] == "kernels" for d in importlib.metadata.distributions())
    assert is_kernels_available() == installed
