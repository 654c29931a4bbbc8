# make install | demo | test | check | bench; `make` alone prints this list.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
# B1; B2; B3; B4; B5; and what is beside them
BENCHMARKS := activation_diet kernels packing first_step recovery checkpoint estimator \
	ingest labels pii compile balance_parity roofline
export PATH := $(CURDIR)/$(BIN):$(PATH)

help:
	@echo "make install   a virtual environment in .venv/, every version pinned in constraints.txt"
	@echo "make demo      the main job on this machine: raw records to a scored adapter and report.html"
	@echo "make test      the test suite, but for the tests marked slow (no GPU needed)"
	@echo "make check     ruff, mypy, layers"
	@echo "make bench     benchmarks that two CPU cores can run; results in benchmarks/results/"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,data,baseline,labels,designer]' -c constraints.txt
	@touch $(STAMP)

demo: install
	@bash examples/demo.sh

test: install
	$(BIN)/pytest

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layers.py

# each in an environment of its own, beside ours
.peers/%/.installed: benchmarks/peers/%.txt
	$(PYTHON) -m venv .peers/$*
	.peers/$*/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

bench: install .peers/datatrove/.installed .peers/data_juicer/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]' -c constraints.txt
	@failed=; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || failed="$$failed $$name"; done; \
	if [ -n "$$failed" ]; then echo "make bench: these ended with an error:$$failed" >&2; exit 1; fi

.PHONY: help install demo test check bench
.DEFAULT_GOAL := help
