# Everything runs inside .venv, which is installed once; a target that needs it makes it first.
#
#   make pretrain CORPUS=sotu CONFIG=configs/run/tiny.yaml ARGS="train.steps=50 train.lr=1e-3"
#
# PYTHON        Python 3.10 or newer with the venv module (default: the first one found)
# DEVICE        cpu or cuda: which torch to install (default: cuda where nvidia-smi works)
# TORCH         requirement of torch for pip (default: chosen by DEVICE)
# TORCH_INDEX   package index to take torch from (default: pip's own, then for CPUs PyTorch's own one)
# PIP_ARGS      further words for every `pip install`
# CORPUS, TOKENIZER, DATA   what `make pretrain` prepares, and where (DATA: data/CORPUS-TOKENIZER)
# CONFIG, ARGS  the run's settings, and words key.sub=value that change them
# LAUNCHER_ARGS words for the deepspeed launcher, for example --num_accelerators 2
# TEST_ARGS     words for pytest, for example -k wkv
# TEST_WORKERS  processes that share the test files (default: two; 0: no sharing, output as it comes)
# MLFLOW_URI, PORT   what `make mlflow-ui` shows, and where on 127.0.0.1

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPES := build/types

PYTHON ?=
ifndef DEVICE
DEVICE := $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)
endif
# The build without CUDA is named as such: the plain version is the one with gigabytes of CUDA libraries.
TORCH_CPU := torch==2.13.0+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH ?= $(if $(filter cuda,$(DEVICE)),torch>=2.13$(comma)<2.14,$(TORCH_CPU))
TORCH_INDEX ?=
PIP_ARGS ?=
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
CORPUS ?= shakespeare
TOKENIZER ?= byte
DATA ?= data/$(CORPUS)-$(TOKENIZER)
CONFIG ?= configs/run/shakespeare.yaml
ARGS ?=
LAUNCHER_ARGS ?=
TEST_ARGS ?=
TEST_WORKERS ?= 2
MLFLOW_URI ?= sqlite:///runs/mlflow.db
PORT ?= 5000
comma := ,

# DeepSpeed finds ninja, and its launcher finds the ranks' python, through PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifneq ($(DEVICE),cuda)
export DS_ACCELERATOR := cpu
endif

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "Variables are described at the top of the Makefile."

.PHONY: venv
venv: $(STAMP) ## create .venv and install everything into it, once

# The stamp is written last, so that an installation that fails is tried again by the next call.
$(STAMP): setup.py pyproject.toml
	@rm -f $@
	@python="$(PYTHON)"; \
	for candidate in $${python:-python3 python3.13 python3.12 python3.11 python3.10}; do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; \
	  then python="$$candidate"; found=1; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo "error: no Python 3.10 or newer with the venv module (Debian: apt-get install python3-venv);" \
	       "name one with PYTHON=" >&2; exit 1; fi; \
	echo "Installing into $(VENV) ($$("$$python" --version), torch for $(DEVICE)): some minutes, once."; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear $(VENV)
	@install="$(BIN)/python -m pip install --quiet $(PIP_ARGS)"; \
	if [ -n "$(TORCH_INDEX)" ]; then $$install --index-url "$(TORCH_INDEX)" "$(TORCH)"; \
	elif [ "$(TORCH)" != "$(TORCH_CPU)" ]; then $$install "$(TORCH)"; \
	else $$install "$(TORCH_CPU)" 2>/dev/null || $$install --index-url $(TORCH_CPU_INDEX) "$(TORCH_CPU)"; fi
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable ".[$(if $(filter cuda,$(DEVICE)),gpu$(comma))dev]"
	@# Without its dependencies: torchvision would replace torch. What tests need of them is in setup.py.
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; \
	then $(BIN)/python -m pip install --quiet --no-deps $(PIP_ARGS) "spikingjelly>=2.0,<2.1"; fi
	@touch $@

.PHONY: pretrain
pretrain: $(STAMP) $(DATA)/manifest.json ## prepare the corpus with Ray, pretrain with DeepSpeed, print samples
	$(BIN)/deepspeed $(LAUNCHER_ARGS) launch/pretrain.py --config $(CONFIG) data.path=$(DATA) $(ARGS)

# The manifest is the last file that the preparation writes: with it, the data are complete.
$(DATA)/manifest.json: | $(STAMP)
	$(BIN)/spikescale data prepare --source $(CORPUS) --tokenizer $(TOKENIZER) --output $(DATA) --workers $(CORES)

.PHONY: test
test: lint test-services ## set up, check style and types, and run every test
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile $(TEST_ARGS)

# SLURM and ssh servers, for the tests that start a cluster on this machine.
.PHONY: test-services
test-services:
	@tests/distributed/install.sh

.PHONY: lint
lint: $(STAMP) typecheck ## check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not read package_dir: show it the layout that the import names have.
.PHONY: typecheck
typecheck: $(STAMP) ## check types (mypy)
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/spikescale
	@for item in spikescale/* kernels data_pipeline configs; do \
	  ln -s "$(CURDIR)/$$item" "$(TYPES)/spikescale/$${item##*/}"; done
	@ln -s "$(CURDIR)/launch" $(TYPES)/launch
	MYPYPATH=$(TYPES) $(BIN)/mypy -p spikescale -p launch

.PHONY: doctor
doctor: $(STAMP) ## what this machine has, and what to do about what it lacks
	$(BIN)/spikescale doctor --mlflow-uri $(MLFLOW_URI)

.PHONY: mlflow-ui
mlflow-ui: $(STAMP) ## the runs' pages, on 127.0.0.1 only
	@mkdir -p runs
	$(BIN)/mlflow ui --backend-store-uri $(MLFLOW_URI) --host 127.0.0.1 --port $(PORT)

.PHONY: wheel
wheel: $(STAMP) ## build dist/*.whl
	@rm -rf build/lib build/bdist.*
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

.PHONY: clean
clean: ## remove what was built, and the tools' caches (data/ and runs/ stay)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)
