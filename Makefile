# Two commands do everything, set-up included: `make demo` and `make test`.
#
#   VENV=0 PYTHON=python3   use an existing environment with torch as it is; nothing is downloaded
#   TORCH="torch==2.11.0"   another torch for .venv
#   ARGS="..."              passed on to the demo, the tests or the benchmark
#
# With a GPU, `make gpu OUT=folder` builds, measures and tests there, and leaves its results in the folder.
#   COMMIT=name             what was measured, where there is no repository to ask

SHELL := /bin/bash
# Tests start many processes, and torch from source takes twice as long to import.
unexport PYTHONDONTWRITEBYTECODE
VENV ?= .venv
PYTHON ?= python3
# Without a GPU a pinned version, of which a CPU build is found where there is one.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
# Comes with a GPU build of torch; on a CPU its interpreter and compiler are for the tests, which say what they skip.
TRITON ?= triton==3.6.0
JOBS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count() or 1)")

SOURCES := pyproject.toml setup.py $(shell find csrc -type f)
# Modules are compiled when they are first imported, most of them never.
PIP := -m pip install -qq --no-compile --disable-pip-version-check --no-warn-script-location --root-user-action ignore
GPU := $(shell command -v nvidia-smi)
NVCC := $(shell command -v "$${CUDACXX:-nvcc}" || command -v /usr/local/cuda/bin/nvcc)
CUDA := $(if $(filter 0,$(MTL_KERNELS_CUDA)),,$(NVCC))
KERNELS := CPU$(if $(CUDA), and CUDA for $(or $(MTL_KERNELS_CUDA_ARCHS),the default architectures), alone, no nvcc)
say = @printf '%-12s %s\n'

# READY has everything. Without a GPU the demo needs less, unless everything is there already; evidence is of the CPU alone.
ifeq ($(VENV),0)
  PY := $(PYTHON)
  RUN := PYTHONPATH=.:python $(PYTHON)
  READY := build/.ready-external
  FOR_DEMO := build/.demo-external
else
  BIN := $(VENV)/bin/
  PY := $(BIN)python
  RUN := $(PY)
  READY := $(VENV)/.ready
  FOR_DEMO := $(VENV)/.demo
endif
DEMO := $(if $(GPU)$(wildcard $(READY)),$(READY),$(FOR_DEMO))
EVIDENCE := $(if $(wildcard $(READY)),$(READY),$(FOR_DEMO))

.PHONY: demo test test-all bench evidence gpu lint dist api clean

demo: $(DEMO)
	$(say) training "three methods, one to three minutes"
	@$(RUN) -m mtl_optim.cli demo $(ARGS)

# A thread a process: there are as many processes as cores, and more threads wait for each other.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest $$($(PY) -c "import xdist" 2>/dev/null && echo "-n $(JOBS) --dist worksteal") $(ARGS)

# Everything that docs/ shows measured, in small: five minutes, then trainings (ARGS are theirs), which go on where they were
# stopped. It replaces the results of a machine of the same name: git has those that were there.
evidence: $(EVIDENCE)
	$(say) measuring "kernels, steps, solvers, agreement, then trainings: under 20 minutes on two cores"
	$(RUN) benchmarks/kernels.py --quick
	$(RUN) benchmarks/steps.py --quick
	$(RUN) benchmarks/solvers.py --quick
	$(RUN) benchmarks/passes.py --quick
	$(RUN) benchmarks/scaling.py --measure --quick
	$(RUN) -m benchmarks.agreement --quick --out benchmarks/results
	OMP_NUM_THREADS=1 $(RUN) benchmarks/train.py --quick --peers $(ARGS)
	$(RUN) benchmarks/document.py

# With the tests marked as exhaustive.
test-all: ARGS += -m ""
test-all: test

bench: $(READY)
	$(RUN) benchmarks/kernels.py $(ARGS)
	$(RUN) benchmarks/steps.py

# The build is its first stage, so that a build that fails is reported like any other.
OUT ?= build/gpu
export COMMIT
gpu: $(if $(filter 0,$(VENV)),,$(READY))
	$(RUN) -u benchmarks/gpu_report.py --out "$(OUT)" $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(BIN)clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu')

# Torch is there before the package asks for it, so that the package's own requirement downloads nothing.
$(VENV)/.torch:
	$(say) environment "$(VENV)"
	@$(PYTHON) -m venv $(VENV)
	$(say) torch "$(TORCH)"
	@$(VENV)/bin/python $(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(say) kernels "CPU alone; and what the demo and the benchmarks need"
	@MTL_KERNELS_CUDA=0 $(VENV)/bin/python $(PIP) --editable ".[bench]"
	@touch $@

$(VENV)/.ready: $(VENV)/.torch $(SOURCES)
	$(say) kernels "$(KERNELS); and pytest, linters, triton"
	@$(VENV)/bin/python $(PIP) --editable ".[dev]"
	@$(VENV)/bin/python -c "import triton" 2>/dev/null || $(VENV)/bin/python $(PIP) "$(TRITON)" || true
	@touch $@

# The native modules are built in place, with the compiler and pybind11 that are there.
build/.demo-external: $(SOURCES)
	$(say) kernels "CPU alone"
	@MTL_KERNELS_CUDA=0 $(PYTHON) setup.py --quiet build_ext --inplace
	@mkdir -p build && touch $@

build/.ready-external: $(SOURCES)
	$(say) kernels "$(KERNELS)"
	@$(PYTHON) setup.py --quiet build_ext --inplace
	@mkdir -p build && touch $@

# The sdist of the last commit, a wheel from it, both checked and tried from another folder; ARGS="--cuda" adds a CUDA wheel.
dist: $(READY)
	@$(PY) $(PIP) build twine
	$(PY) release/build.py $(ARGS)

api: $(READY)
	$(RUN) docs/generate_api.py

clean:
	rm -rf build dist *.egg-info mtl_kernels/*.so
