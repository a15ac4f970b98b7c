# `make` prints the commands. They need Python 3.11 or newer and install everything else into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The programs get Ctrl-C, SIGTERM and SIGHUP when they can handle them, not while Python starts. GNU's env can do this.
DELAY_SIGNALS := $(shell env --block-signal=INT,TERM,HUP true 2>/dev/null && echo env --block-signal=INT,TERM,HUP)
# The newest release; the contract must stay compatible with it.
RELEASE = $(shell git describe --tags --abbrev=0 --match 'v*' 2>/dev/null)
# Packages of `make bench-gpu` for a GPU machine without network access, and the version of that machine's Python.
GPU_PACKAGES ?= .gpu-packages
GPU_PYTHON ?= 3.12
SOURCES := server client tests tools benchmarks examples conformance hatch_build.py
PROTOS := $(wildcard protos/llama2/*/*.proto protos/llama2/*/*/*.proto conformance/v1/*.proto)
NATIVE := $(wildcard server/llama2_server/engine/native/*.[ch]pp server/llama2_server/engine/native/kernels/*.hpp)

.PHONY: run quick test chaos soak determinism audit checkov image-test mutants check format proto docs lock dist conformance conformance-full simulation bench bench-gpu gpu-packages triton-versions demo-model clean help

help:
	@echo "make run         start the service with the demo model (ARGS='--listen … --card … --weights …' for another)"
	@echo "make quick       run the unit tests, in under a minute (PYTEST_ARGS='-k quota' for a part)"
	@echo "make check       check format, lint, types, import rules, names, English, references, contract and container files"
	@echo "make test        run all checks, then all tests"
	@echo "make chaos       kill and flood real servers, stop their stores, fill their disk; check the promises (docs/reliability.md)"
	@echo "make determinism compare 100,000 texts of equal and of different fingerprints (docs/exactly-once.md)"
	@echo "make soak        mixed traffic for 20 minutes; check that memory, files and threads do not grow"
	@echo "make audit       write the SBOMs of the container's packages, and look for known vulnerabilities"
	@echo "make checkov     check the chart's manifests and the Dockerfile; helm/checkov.yaml explains what may fail"
	@echo "make image-test  build the Dockerfile with buildah, write the image's SBOM, and run it under runc (docs/container.md)"
	@echo "make mutants     change the server's code in 300 places, and check that the tests find it (one to two hours; ARGS='--first 30')"
	@echo "make format      format the code and the contract"
	@echo "make proto       generate the Python stubs"
	@echo "make docs        generate the references of the API, settings and metrics, and the chart's copies of settings"
	@echo "make lock        resolve the container's lock files"
	@echo "make dist        build the wheel and the source archive into dist (docs/systemd.md)"
	@echo "make conformance run the conformance kit: this server, all clients, wrong servers and clients (conformance/README.md)"
	@echo "make conformance-full  the same, every case against every wrong server and client, and a million bodies"
	@echo "make simulation  simulate a million requests with faults, and check them (ARGS='--seed 7' for a part)"
	@echo "make bench       compare engine and service with other libraries on this CPU (ARGS='--parts speed …' for a part)"
	@echo "make triton-versions  test the GPU kernels with the locked and with the oldest Triton, instead of the newest"
	@echo "make bench-gpu   the same on an NVIDIA GPU, at Llama-2-7B's size (benchmarks/gpu/README.md)"
	@echo "make demo-model  train the demo model (two cores, estimated 3 hours; goes on after an interruption)"
	@echo "make clean       delete .venv and everything that was generated"

run: $(VENV)/.server
	@$(DELAY_SIGNALS) $(BIN)/llama2-server $(ARGS)

# Without the GPU kernels, which Triton's interpreter runs slowly; `make test` runs them.
quick: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto tests/unit --ignore=tests/unit/engine/cuda $(PYTEST_ARGS)

test: check
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Without gRPC's own lines about the connections that the scenes break.
chaos: $(VENV)/.dev
	GRPC_VERBOSITY=NONE GRPC_ENABLE_FORK_SUPPORT=0 $(BIN)/python -m tests.reliability.chaos $(ARGS)

determinism: $(VENV)/.dev
	$(BIN)/python -m tests.reliability.determinism $(ARGS)

soak: $(VENV)/.dev
	$(BIN)/python -m tests.reliability.soak $(ARGS)

audit: $(VENV)/.dev
	$(BIN)/python -m tools.audit $(ARGS)

checkov: $(VENV)/.dev
	$(BIN)/python -m tools.audit.checkov

image-test: $(VENV)/.dev
	$(BIN)/python -m tools.container.image $(ARGS)

mutants: $(VENV)/.dev
	$(BIN)/python -m tools.mutants $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.settings_reference --check
	$(BIN)/python -m tools.api_reference --check
	$(BIN)/python -m tools.names
	$(BIN)/python -m tools.prose
	$(BIN)/codespell
	$(BIN)/hadolint Dockerfile
	$(BIN)/python -m tools.container.lock --check
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	@$(if $(RELEASE),$(BIN)/buf breaking --against '.git#tag=$(RELEASE)',echo "buf breaking: no release tag (v*) yet, nothing to compare")

format: $(VENV)/.dev
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/buf format --write

proto: $(VENV)/.server
	$(PIP) install --quiet --no-deps --editable .

# PyPI's torch is the CUDA build. The CPU build comes from download.pytorch.org or a directory: PIP_FIND_LINKS=… make lock.
lock: $(VENV)/.dev
	$(BIN)/python -m tools.container.lock

# The wheel is built from the source archive, so it proves that the archive is complete.
dist: $(VENV)/.dev
	$(BIN)/uv build --out-dir dist .

conformance: $(VENV)/.dev
	$(BIN)/python -m conformance server
	$(BIN)/python -m conformance client --all
	$(BIN)/python -m conformance mutants

conformance-full: conformance
	$(BIN)/python -m conformance mutants --full
	$(BIN)/python -m conformance equivalence --bodies 1000000

simulation: $(VENV)/.dev
	$(BIN)/python -m tests.reliability.simulation $(or $(ARGS),--requests 1000000)

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks $(ARGS)

# Uses the GPU machine's own Python and leaves its torch unchanged; see benchmarks/gpu/README.md for the requirements.
bench-gpu:
	PYTHONPATH=$(GPU_PACKAGES):protos:server:client $(PYTHON) -m benchmarks.gpu $(ARGS)

gpu-packages: $(VENV)/.dev
	$(BIN)/python -m benchmarks.gpu.packages --python $(GPU_PYTHON) --out $(GPU_PACKAGES)

docs: $(VENV)/.dev
	$(BIN)/python -m tools.settings_reference
	$(BIN)/python -m tools.api_reference
	$(BIN)/python -m tools.chart
	$(BIN)/python -m tools.metrics_reference

# The interpreter of Triton 3.6 converts arrays to numbers in a way that NumPy 2.4 removed. Only the locked Triton also compiles.
triton-versions: $(VENV)/.dev
	set -e; compiled="tests/integration/engine/test_kernel_compilation.py tests/integration/engine/test_fused_compilation.py"; \
	for packages in $$(grep -o '^triton==[0-9.]*' requirements/server-cuda.lock) "triton==3.6.0 numpy==2.3.5"; do \
	  folder=$$(mktemp -d); $(PIP) install -q --no-deps --target $$folder $$packages; \
	  PYTHONPATH=$$folder $(BIN)/python -m pytest -W default::DeprecationWarning -q tests/unit/engine/cuda/test_kernels.py \
	    tests/unit/engine/cuda/test_fused_kernels.py tests/unit/engine/cuda/test_fused_sampling.py \
	    tests/unit/engine/cuda/test_fused_proof.py tests/unit/engine/cuda/test_7b_widths.py $$compiled; \
	  rm -r $$folder; compiled=; done

demo-model: $(VENV)/.dev
	$(BIN)/python -m tools.demo_model.train

# Every install runs the build hook (hatch_build.py), which generates the stubs and compiles the native library.
$(VENV)/.server: pyproject.toml constraints.txt hatch_build.py $(PROTOS) $(NATIVE) | $(BIN)/python
	@$(DELAY_SIGNALS) $(BIN)/python -m tools.install server
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt hatch_build.py $(PROTOS) $(NATIVE) | $(BIN)/python
	@$(DELAY_SIGNALS) $(BIN)/python -m tools.install server,dev
	@touch $@ $(VENV)/.server

$(BIN)/python:
	@$(DELAY_SIGNALS) $(PYTHON) -m tools.install venv $(VENV)

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find protos conformance -name '*_pb2*' -delete
	rm -f protos/llama2/v1/descriptors.pb
	rm -f server/llama2_server/engine/native/decode.so
