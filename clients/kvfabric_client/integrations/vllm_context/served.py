"""Which engines can have their KV on fabric nodes, and how it lies there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import SlidingWindowSpec

from kvfabric.attention.shape import ITEM_BYTES
from kvfabric.types import Format

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

WINDOW = 2
"""Tokens that the engine believes a row to need, its own counted. So it keeps the block of the one
before a step, by which it is told that a request cannot go on."""


def why_not_attended(config: VllmConfig, kv_cache: KVCacheConfig) -> str:
    """Why this engine's KV cannot lie elsewhere, with the remedy, or nothing."""
    parallel, cache = config.parallel_config, config.cache_config
    specs = [group.kv_cache_spec for group in kv_cache.kv_cache_groups]
    reasons = {
        "its KV cache is not in the memory of the processor": (
            config.device_config.device_type != "cpu"
        ),
        "it runs on several ranks; set tensor, pipeline and decode-context parallel size to 1": (
            parallel.world_size > 1
        ),
        "it decodes speculatively; leave speculative_config out": (
            config.speculative_config is not None
        ),
        "its own prefix cache would count tokens whose KV it no longer has; set "
        "enable_prefix_caching=False": bool(cache.enable_prefix_caching),
        "kv_load_failure_policy must be 'fail': with 'recompute' vLLM would go on behind the "
        "tokens whose KV is lost; it is scheduler_cls that has them computed": (
            config.kv_transfer_config.kv_load_failure_policy != "fail"
        ),
        "the plugin 'kvfabric' was not loaded, or a layer does not attend the whole context; "
        "install kvfabric into this environment, and name it in VLLM_PLUGINS if that is set": any(
            not isinstance(spec, SlidingWindowSpec) or spec.sliding_window != WINDOW
            for spec in specs
        ),
        f"its KV is none of {', '.join(ITEM_BYTES)}": any(
            str(spec.dtype).removeprefix("torch.") not in ITEM_BYTES for spec in specs
        ),
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)


def form_of(config: VllmConfig, kv_cache: KVCacheConfig) -> Format:
    """Plain blocks, of the engine's own size."""
    spec = kv_cache.kv_cache_groups[0].kv_cache_spec
    return Format(
        dtype=str(spec.dtype).removeprefix("torch."),
        block_tokens=spec.block_size,
        layers=config.model_config.get_num_layers(config.parallel_config),
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
    )
