"""What vLLM calls in each of its processes (entry point group `vllm.general_plugins`). It imports
nothing that is not needed: most of these engines have no fabric."""

from __future__ import annotations

BACKEND = "kvfabric_client.integrations.vllm_context.backend.FabricBackend"


def register() -> None:
    """Puts our backend in the place of vLLM's for CPUs; without our connector it is the same."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
