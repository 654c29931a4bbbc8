"""What a run imports before its first step, and that nothing hidden on the way stays hidden."""

import gc
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tuneloom import imports
from tuneloom.testing import tiny_model

UNUSED = ("bitsandbytes", "pandas", "scipy.optimize", "torch._inductor.compile_fx", "ray", "wandb")
TRAINED = """
import json, sys
from pathlib import Path
from tuneloom.config import build
from tuneloom.testing import small_config
from tuneloom.train.config import TrainConfig
from tuneloom.train.loop import fit
lab = Path(sys.argv[1])
def train(name, **keys): fit(build(TrainConfig, small_config(lab, name, steps=1, **keys)))
train("plain")
early = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
train("muon", optim__name="muon", optim__clip=0.0, method__kind="full")
train("quantised", method__kind="qlora", model__dtype="bf16", model__path=str(lab / "wide"))
print(json.dumps({"early": early, "then": "bitsandbytes" in sys.modules}))
"""


def test_a_hidden_package_is_not_found_and_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seldom_used.py").write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    with imports.absent("seldom_used"):
        assert importlib.util.find_spec("seldom_used") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("seldom_used")
    with imports.absent("seldom_used"):
        pass
    assert importlib.import_module("seldom_used").VALUE == 3
    with imports.absent("seldom_used"):  # imported already: hiding it would save nothing
        assert importlib.import_module("seldom_used").VALUE == 3
    del sys.modules["seldom_used"]


def test_garbage_is_collected_again_after_imports_that_fail() -> None:
    with pytest.raises(ModuleNotFoundError), imports.unswept():
        assert not gc.isenabled()
        importlib.import_module("no_such_module_here")
    assert gc.isenabled()


def test_plain_lora_imports_nothing_it_does_not_use_and_qlora_may_follow_in_one_process(
    lab: Path, tmp_path: Path
) -> None:
    for name in ("base", "rows.jsonl"):
        source = lab / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    tiny_model(tmp_path / "wide", hidden=128)
    words = [sys.executable, "-c", TRAINED, str(tmp_path), json.dumps(UNUSED)]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads(ran.stdout.splitlines()[-1]) == {"early": [], "then": True}
    held = json.loads((tmp_path / "runs" / "quantised" / "run.json").read_text())
    assert held["state"] == "done"
