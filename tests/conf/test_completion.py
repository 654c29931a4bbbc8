"""Tab completion: what a real bash offers after `eval "$(tuneloom -sc install=bash)"`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuneloom.cli import main

SCRIPT = """
eval "$(tuneloom -sc install=bash)"
offered() {
  export COMP_LINE="$1" COMP_POINT=${#1}
  local words=($1)
  [ "${1: -1}" != " " ] || words+=("")
  COMP_CWORD=$((${#words[@]} - 1))
  hydra_bash_completion
  echo "${COMPREPLY[*]}"
}
complete -p tuneloom
offered "tuneloom tr"
offered "tuneloom "
offered "tuneloom train zero.st"
offered "tuneloom ingest data.na"
offered "tuneloom nothing x"
"""


def test_bash_offers_verbs_then_the_keys_of_the_verb() -> None:
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-c", SCRIPT], capture_output=True, text=True, env=os.environ | {"PATH": paths}
    )
    rule, *offered = ran.stdout.splitlines()
    assert ran.stderr == "" and rule.endswith("-F hydra_bash_completion tuneloom")
    assert offered[0] == "train" and offered[1].split()[:3] == ["doctor", "ingest", "inspect"]
    assert offered[2:] == ["zero.stage=", "data.name=", ""]


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-sc", "install=csh"]) == 2
    assert "-sc: expected one of install=bash" in capsys.readouterr().err
