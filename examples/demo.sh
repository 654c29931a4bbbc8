#!/usr/bin/env bash
# The main job, each step one command that a user would type: make demo
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)
run="demo-$(date -u +%Y%m%d-%H%M%S)"
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

say "1/7 tuneloom ingest data=debian            raw records -> dataset"
tuneloom ingest data=debian
say "2/7 tuneloom plan experiment=demo          what it will take"
tuneloom plan experiment=demo
say "3/7 tuneloom train experiment=demo         LoRA, two Ray workers, DeepSpeed ZeRO-2 over gloo, W&B offline"
tuneloom train experiment=demo run.id="$run"
say "4/7 tuneloom evaluate run=runs/$run        base and tuned on rows neither saw"
OMP_NUM_THREADS=2 tuneloom evaluate run="runs/$run"
say "5/7 tuneloom export run=runs/$run          adapter with its contract"
tuneloom export run="runs/$run"
say "6/7 tuneloom generate                      a fresh process opens what was exported"
prompt=$'Package: python3-yaml\nDescription: YAML parser and emitter for Python3\nWhich section?'
tuneloom generate model.path=examples/tiny-base adapter="runs/$run/export/adapter" prompt="$prompt"
say "7/7 tuneloom report run=runs/$run"
tuneloom report run="runs/$run"
python -m tuneloom.evals.verdict "runs/$run" $(($(date +%s) - started))
