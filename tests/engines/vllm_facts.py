"""What the vLLM connector makes of configurations, found without starting an engine.

Run as a script: MODEL OTHER_WEIGHTS FOLDER; prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any


def main(model: str, other: str, folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    import torch
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        SlidingWindowSpec,
    )

    from kvfabric.errors import FabricError
    from kvfabric_client.integrations._vllm_identity import namespace_of
    from kvfabric_client.integrations._vllm_layout import packing, shape_of, why_not_served
    from kvfabric_client.integrations.vllm import settings_of

    def config(path: str = model, **given: Any) -> Any:
        given = {"dtype": "float32", "block_size": 32, "max_model_len": 512} | given
        return EngineArgs(model=path, enforce_eager=True, **given).create_engine_config()

    sizes = {"num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    full = KVCacheGroupSpec(["a"], FullAttentionSpec(block_size=32, **sizes))
    window = KVCacheGroupSpec(["b"], SlidingWindowSpec(block_size=32, sliding_window=64, **sizes))

    def cache(*groups: Any) -> Any:
        return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=list(groups))

    def fingerprint(path: str = model, weights: str | None = None, **given: Any) -> str:
        asked = config(path, **given)
        form = shape_of(asked, cache(full)).format()
        return namespace_of(asked, form, "default", weights).fingerprint.hex()

    def refusal(call: Any) -> str:
        try:
            call()
        except FabricError as error:
            return str(error)
        return ""

    def transfer(policy: str, **extra: Any) -> Any:
        return KVTransferConfig(
            kv_load_failure_policy=policy,
            kv_connector_extra_config=extra,
        )

    said = {
        "fingerprints": {
            "same": fingerprint(),
            "again": fingerprint(),
            "other weights": fingerprint(other),
            "given weights": fingerprint(weights="f00d"),
            "bfloat16": fingerprint(dtype="bfloat16"),
            "other hash": fingerprint(prefix_caching_hash_algo="sha256_cbor"),
        },
        "reasons": {
            "full": why_not_served(config(), cache(full)),
            "hybrid": why_not_served(config(), cache(full, window)),
            "window": why_not_served(config(), cache(window)),
        },
        "refusals": {
            "fail": refusal(lambda: settings_of(transfer("fail"))),
            "unknown key": refusal(lambda: settings_of(transfer("recompute", hme="unix:/x"))),
            "dummy weights": refusal(lambda: fingerprint(load_format="dummy")),
            "none": refusal(lambda: settings_of(transfer("recompute", load_timeout_s=1))),
        },
        "packings": {
            str(dtype).removeprefix("torch."): [
                packing(dtype, dtype, 32, 32),
                _packed_plainly(dtype),
            ]
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        },
        "dropped": _dropped(shape_of(config(), cache(full)), Path(folder) / "silent.sock"),
    }
    print(json.dumps(said), file=answers, flush=True)


def _packed_plainly(dtype: Any) -> bool:
    """Whether a block written by vLLM's kernel holds K transposed, then V as it is."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    heads, tokens, dim = 2, 32, 32
    key, value = torch.randn(2, tokens, heads, dim).to(dtype)
    block = torch.zeros(1, heads, tokens, 2 * dim, dtype=dtype)
    halves = block.view(1, heads, 2 * tokens, dim).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        key, value, *halves, torch.arange(tokens), _get_attn_isa(dtype, tokens, dim, "auto")
    )
    k, v = block.view(heads, 2, -1).unbind(1)
    return torch.equal(k, key.permute(1, 2, 0).reshape(heads, -1)) and torch.equal(
        v, value.permute(1, 0, 2).reshape(heads, -1)
    )


def _dropped(shape: Any, silent: Path) -> list[int]:
    """Blocks dropped of five, of which three may be queued, by a node that never answers:
    when `save` returns, and after the flush."""
    import torch

    from kvfabric.types import Namespace
    from kvfabric_client.integrations._vllm_layout import BlockMemory
    from kvfabric_client.integrations._vllm_link import Door
    from kvfabric_client.integrations._vllm_messages import Blocks
    from kvfabric_client.integrations._vllm_worker import Saver

    memory = BlockMemory({name: torch.zeros(8, 2, 32, 64) for name in "abcd"}, 8)
    with socket.socket(socket.AF_UNIX) as node:
        node.bind(str(silent))
        node.listen()
        door = Door(f"unix:{silent}", Namespace("default", bytes(32)))
        saver = Saver(memory, shape, 0, door, 3 * memory.shard_bytes)
        links = tuple(bytes([n]) * 32 for n in range(5))
        saver.save(Blocks(first=0, links=links, block_ids=(7, 5, 3, 1, 0)))
        at_once = saver.counters.save_dropped
        saver.close()
        return [at_once, saver.counters.save_dropped]


if __name__ == "__main__":
    main(*sys.argv[1:])
