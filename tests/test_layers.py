"""The house: who may import whom, and the names that must not be taken."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ({"launch"}, {"monitor"}, {"serve", "evals", "train"}, {"data"}, {"registry", "kernels"})
ORDER = {name: height for height, names in enumerate(reversed(LAYERS)) for name in names}
FOLDERS = {
    name: ROOT / name if (ROOT / name).is_dir() else ROOT / "tuneloom" / name for name in ORDER
}
ONE_HOME = ("wandb", "flash_attn", "sklearn", "cleanlab", "presidio_analyzer", "rensa", "ftfy")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", sorted(ORDER))
def test_a_package_imports_only_what_stands_below_it(package: str) -> None:
    for path in FOLDERS[package].rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            if (
                parts[0] == "tuneloom"
                and len(parts) > 1
                and parts[1] in ORDER
                and parts[1] != package
            ):
                assert ORDER[parts[1]] < ORDER[package], f"{path} imports {name}"


@pytest.mark.parametrize(
    ("package", "banned"), [("train", "ray"), ("data", "torch"), ("registry", "torch")]
)
def test_heavy_parts_stay_where_they_belong(package: str, banned: str) -> None:
    for path in FOLDERS[package].rglob("*.py"):
        assert banned not in {name.split(".")[0] for name in imports(path)}, path


@pytest.mark.parametrize("library", ONE_HOME)
def test_an_optional_package_is_imported_in_one_module(library: str) -> None:
    homes = {
        path
        for folder in [*FOLDERS.values(), ROOT / "tuneloom"]
        for path in folder.glob("*.py")
        if library in {name.split(".")[0] for name in imports(path)}
    }
    assert len(homes) <= 1, homes


def test_the_launcher_starts_without_torch() -> None:
    names = (
        "import sys, tuneloom.launch.run, tuneloom.launch.supervise; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", names], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_no_folder_takes_a_name_that_transformers_executes() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
