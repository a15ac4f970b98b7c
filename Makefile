# Two commands do everything on a fresh machine with Python 3.11 or newer: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The main branch that the contract must not break: the remote's where there is one.
MAIN_REF = $(firstword $(shell git for-each-ref --format='%(refname)' refs/remotes/origin/main refs/heads/main))
# What a machine with a GPU but no network lacks for `make bench-gpu`, and the version of its Python.
GPU_PACKAGES ?= .gpu-packages
GPU_PYTHON ?= 3.12
SOURCES := server client tests tools benchmarks examples hatch_build.py
PROTOS := $(wildcard protos/llama2/v1/*.proto)
NATIVE := $(wildcard server/llama2_server/engine/native/*.[ch]pp)

.PHONY: run test check format proto docs lock bench bench-gpu gpu-packages demo-model clean help

help:
	@echo "make run         start the service with the demo model (ARGS='--listen … --card … --weights …' for another)"
	@echo "make test        check, then every test"
	@echo "make check       formatting, lint, types, import rules, the contract, the Dockerfile and its lock files"
	@echo "make format      put code and contract into shape"
	@echo "make proto       generate the Python stubs"
	@echo "make docs        write the references of the API, settings and metrics, and the chart's copies"
	@echo "make lock        make the container's lock files anew"
	@echo "make bench       compare engine and service with other libraries on this CPU (ARGS='--parts speed …' for a part)"
	@echo "make bench-gpu   the same on an NVIDIA GPU, at Llama-2-7B's size (benchmarks/gpu/README.md)"
	@echo "make demo-model  train the demo model anew (under an hour on two cores)"

run: $(VENV)/.server
	@$(BIN)/llama2-server $(ARGS)

test: check
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.settings_reference --check
	$(BIN)/python -m tools.api_reference --check
	$(BIN)/hadolint Dockerfile
	$(BIN)/python -m tools.container.lock --check
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	@$(if $(MAIN_REF),$(BIN)/buf breaking --against '.git#ref=$(MAIN_REF)',echo "NOT CHECKED: no main branch to compare the contract with")

format: $(VENV)/.dev
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/buf format --write

proto: $(VENV)/.server
	$(PIP) install --quiet --no-deps --editable .

# PyPI's torch is the CUDA build. The CPU's comes from download.pytorch.org, or from a directory: PIP_FIND_LINKS=… make lock.
lock: $(VENV)/.dev
	$(BIN)/python -m tools.container.lock

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks $(ARGS)

# With the Python of a machine that has a GPU, whose torch is not touched; benchmarks/gpu/README.md says what it needs.
bench-gpu:
	PYTHONPATH=$(GPU_PACKAGES):protos:server:client $(PYTHON) -m benchmarks.gpu $(ARGS)

gpu-packages: $(VENV)/.dev
	$(BIN)/python -m benchmarks.gpu.packages --python $(GPU_PYTHON) --out $(GPU_PACKAGES)

docs: $(VENV)/.dev
	$(BIN)/python -m tools.settings_reference
	$(BIN)/python -m tools.api_reference
	$(BIN)/python -m tools.chart
	$(BIN)/python -m tools.metrics_reference

demo-model: $(VENV)/.dev
	$(BIN)/python -m tools.demo_model.train

# The build hook (hatch_build.py), which every install runs, generates the stubs and compiles the native decode step.
$(VENV)/.server: pyproject.toml constraints.txt hatch_build.py $(PROTOS) $(NATIVE) | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[server]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt hatch_build.py $(PROTOS) $(NATIVE) | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[server,dev]'
	@touch $@ $(VENV)/.server

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find protos -name '*_pb2*' -delete
	rm -f server/llama2_server/engine/native/decode.so
