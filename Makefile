PY ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

PROTOS := $(wildcard proto/kvfabric/rpc/v1/*.proto)

.PHONY: stubs
stubs: ## Regenerates the Python stubs from proto/
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=fabric --grpc_python_out=fabric \
		--mypy_out=quiet:fabric --mypy_grpc_out=quiet:fabric \
		--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
		--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc $(PROTOS)
