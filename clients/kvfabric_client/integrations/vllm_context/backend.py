"""vLLM's CPU attention, or with this package's connector, attention on fabric nodes.

vLLM is told that each layer needs the last tokens alone (a sliding window), so that its block
manager frees all older blocks; model and attention know nothing of a window.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvfabric.errors import Refused
from kvfabric_client.integrations.vllm_context.contexts import Asked, Contexts
from kvfabric_client.integrations.vllm_context.served import WINDOW

if TYPE_CHECKING:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec

CONNECTOR = "KVFabricContextConnector"


class FabricImpl(CPUAttentionBackendImpl):  # type: ignore[misc]  # vllm is untyped here
    """One layer's attention."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Refused for what nodes do not compute, where the connector is configured."""
        super().__init__(*args, **kwargs)
        transfer = get_current_vllm_config().kv_transfer_config
        self._elsewhere = transfer is not None and transfer.kv_connector == CONNECTOR
        # What a backend's layers need is asked of the class, later and without a config.
        FabricBackend.elsewhere = self._elsewhere
        if self._elsewhere and (reason := self._why_not()):
            raise Refused(f"a layer of this model cannot be attended on fabric nodes: {reason}")

    def _why_not(self) -> str:
        reasons = {
            "it has ALiBi slopes": self.alibi_slopes is not None,
            "it has a sliding window": self.sliding_window != -1,
            "it has learned sinks": self.sinks is not None,
            "it is not a decoder's": self.attn_type != AttentionType.DECODER,
            "its KV is quantised": self.is_fp8_kv_cache,
            "it uses another layer's KV": self.kv_sharing_target_layer_name is not None,
        }
        return "; ".join(reason for reason, holds in reasons.items() if holds)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not self._elsewhere:
            own: torch.Tensor = super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
            return own
        if attn_metadata is None:  # warming up
            return output
        contexts = _contexts()
        rows = _rows_of(attn_metadata, block_tokens=kv_cache.shape[2])
        answers = contexts.attend(
            extract_layer_index(layer.layer_name),
            [
                Asked(block, query[some], key[some].transpose(0, 1), value[some].transpose(0, 1))
                for block, some in rows.items()
            ],
            self.scale,
            self.logits_soft_cap,
        )
        whole = output.view(-1, self.num_heads, self.head_size)
        for block, some in rows.items():
            if block in answers:
                whole[some] = torch.from_numpy(answers[block]).to(output.dtype)
            else:
                whole[some] = 0
        return output


class FabricBackend(CPUAttentionBackend):  # type: ignore[misc]
    """See the module."""

    elsewhere = False

    @staticmethod
    def get_impl_cls() -> type[FabricImpl]:
        return FabricImpl

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if not cls.elsewhere or type(spec) is not FullAttentionSpec:
            return spec
        return SlidingWindowSpec(
            block_size=spec.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            kv_quant_mode=spec.kv_quant_mode,
            sliding_window=WINDOW,
        )


def _contexts() -> Contexts:
    """The worker's, of the connector that vLLM has made."""
    connector = get_kv_transfer_group() if has_kv_transfer_group() else None
    contexts = getattr(connector, "contexts", None)
    if not isinstance(contexts, Contexts):
        raise Refused(f"this process has no {CONNECTOR}, which knows where its KV lies")
    return contexts


def _rows_of(metadata: CPUAttentionMetadata, block_tokens: int) -> dict[int, slice]:
    """The rows of each request, by the block of its last one."""
    bounds = metadata.query_start_loc.tolist()
    slots = metadata.slot_mapping
    return {
        int(slots[end - 1]) // block_tokens: slice(first, end)
        for first, end in itertools.pairwise(bounds)
        if end > first
    }
