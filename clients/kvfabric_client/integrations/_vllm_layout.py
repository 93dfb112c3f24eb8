"""How a vLLM engine's KV blocks become shards: which engines, which part, which bytes.

A shard is one block of one rank over all layers, layer-major, as the engine packed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import vllm
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvfabric.errors import Unsupported
from kvfabric.keys import shard_key
from kvfabric.types import Format, Key, NamespaceId, Part

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvfabric_client.integrations._vllm_messages import Blocks

Bytes = npt.NDArray[np.uint8]

# Versions whose CPU kernels were read and tried: within them, a packing is known by its
# instruction set alone. "vec" and "vec16": K transposed, V plain; "amx": tiles.
KNOWN_VERSIONS = ("0.32.",)
KNOWN_PACKINGS = {"vec": "vllm-cpu-vec", "vec16": "vllm-cpu-vec", "amx": "vllm-cpu-amx"}


@dataclass(frozen=True, slots=True)
class Shape:
    """What all ranks of an engine share: sizes of a block, and how ranks split the heads."""

    block_tokens: int
    layers: int
    heads: int  # of one rank
    head_dim: int
    total_heads: int
    ranks: int
    dtype: str
    packing: str

    def format(self) -> Format:
        """The format of the engine's namespace, equal for every number of ranks."""
        return Format(
            dtype=self.dtype,
            block_tokens=self.block_tokens,
            packing=self.packing,
            layers=self.layers,
            kv_heads=self.total_heads,
            head_dim=self.head_dim,
        )

    def first_head(self, rank: int) -> int:
        """The first KV head that a rank holds; ranks beyond the heads repeat them."""
        return rank * self.total_heads // self.ranks

    def first_heads(self) -> tuple[int, ...]:
        """Of every distinct part, in order."""
        return tuple(dict.fromkeys(self.first_head(rank) for rank in range(self.ranks)))

    def keys(
        self, room: NamespaceId, first_head: int, first: int, links: Sequence[bytes]
    ) -> list[Key]:
        """Of the blocks from number `first` on, whose block hashes are `links`."""
        tokens = self.block_tokens
        return [
            shard_key(
                room,
                link,
                Part(
                    first_token=index * tokens,
                    tokens=tokens,
                    layers=self.layers,
                    first_head=first_head,
                    heads=self.heads,
                ),
            )
            for index, link in enumerate(links, first)
        ]

    def keys_with_parents(
        self, room: NamespaceId, first_head: int, blocks: Blocks
    ) -> tuple[list[Key], list[Key]]:
        """The keys of a run of blocks, and the key before each (empty at the start)."""
        keys = self.keys(room, first_head, blocks.first, blocks.links)
        before = (
            self.keys(room, first_head, blocks.first - 1, (blocks.parent,))
            if blocks.parent
            else [Key(b"")]
        )
        return keys, before + keys[:-1]


def why_not_served(config: VllmConfig, kv_cache: KVCacheConfig) -> str:
    """Why this engine's KV cannot be shared (it then runs without the fabric), or nothing."""
    parallel = config.parallel_config
    groups = kv_cache.kv_cache_groups
    reasons = {
        "its KV cache is not in the memory of the processor": (
            config.device_config.device_type != "cpu"
        ),
        "it splits layers over ranks (pipeline_parallel_size)": (
            parallel.pipeline_parallel_size > 1
        ),
        "it splits contexts over ranks (decode_context_parallel_size)": (
            parallel.decode_context_parallel_size > 1
        ),
        "it decodes speculatively, so that blocks hold guesses": (
            config.speculative_config is not None
        ),
        "not all of its layers keep the whole context (sliding window, Mamba, MLA, ...)": (
            len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec
        ),
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)


def shape_of(config: VllmConfig, kv_cache: KVCacheConfig) -> Shape:
    """The shape of an engine that is served (see `why_not_served`)."""
    (group,) = kv_cache.kv_cache_groups
    spec = group.kv_cache_spec
    model, ranks = config.model_config, config.parallel_config.tensor_parallel_size
    return Shape(
        block_tokens=spec.block_size,
        layers=model.get_num_layers(config.parallel_config),
        heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        total_heads=max(model.get_total_num_kv_heads(), spec.num_kv_heads),
        ranks=ranks,
        dtype=str(spec.dtype).removeprefix("torch."),
        packing=packing(
            model.dtype,
            spec.dtype,
            spec.block_size,
            spec.head_size,
            config.cache_config.cache_dtype,
        ),
    )


def packing(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    block_tokens: int,
    head_dim: int,
    cache_name: str = "auto",
) -> str:
    """The name of what the CPU backend of this vLLM on this processor makes of a block.

    `dtype` is the model's, `cache_dtype` what is kept, `cache_name` vLLM's setting for it.
    """
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(dtype, block_tokens, head_dim, cache_name)
    known = KNOWN_PACKINGS.get(isa)
    if known and dtype == cache_dtype and vllm.__version__.startswith(KNOWN_VERSIONS):
        return known
    return f"vllm-{vllm.__version__}-cpu-{isa}-{dtype}-{cache_name}-{block_tokens}x{head_dim}"


class BlockMemory:
    """One rank's KV cache as bytes: for each layer `[blocks, bytes of a block]`."""

    def __init__(self, caches: dict[str, torch.Tensor], blocks: int) -> None:
        """Unsupported where a block of a layer is not one piece of memory."""
        layers: dict[int, Bytes] = {}  # layers that share another's cache appear once
        for name, cache in caches.items():
            if not cache.is_contiguous() or cache.numel() % blocks:
                raise Unsupported(
                    f"the KV cache of {name} has shape {tuple(cache.shape)} and strides "
                    f"{cache.stride()}, so its blocks are not in one piece; run this engine "
                    "without the connector"
                )
            flat = cache.detach().view(torch.uint8).view(blocks, -1).numpy()
            layers.setdefault(cache.data_ptr(), flat)
        sizes = {layer.shape[1] for layer in layers.values()}
        if len(sizes) != 1:
            raise Unsupported(
                f"layers' blocks have different sizes, {sorted(sizes)} bytes; run this engine "
                "without the connector"
            )
        self._layers = list(layers.values())
        self.layers = len(layers)
        self.layer_bytes = sizes.pop()
        self.shard_bytes = self.layers * self.layer_bytes

    def pieces(self, block: int) -> list[Bytes]:
        """A block's memory, one writable array per layer."""
        return [layer[block] for layer in self._layers]

    def copy_out(self, block: int, shard: Bytes) -> None:
        """Copy a block into `shard` (`shard_bytes` long)."""
        rows = shard.reshape(self.layers, self.layer_bytes)
        for row, layer in zip(rows, self._layers, strict=True):
            row[:] = layer[block]
