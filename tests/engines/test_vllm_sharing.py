"""vLLM engines that share their KV through a node: what one has computed, none computes again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvfabric.types import Key, Namespace
from kvfabric_client import connect

if TYPE_CHECKING:
    from tests.engines.conftest import Engine, MemoryNode

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

Prompt = Callable[[int, int], list[int]]


def test_a_fresh_engine_loads_what_another_has_computed(
    start_node: Callable[..., MemoryNode],
    start_engine: Callable[..., Engine],
    other_weights: Path,
    prompt: Prompt,
) -> None:
    node = start_node()
    prompts = [prompt(1000, 1), prompt(320, 2), prompt(64, 3), prompt(20, 4)]
    first = start_engine(node.home)
    computed = first.ask(*prompts, max_tokens=40)
    first.stop()

    second = start_engine(node.home)
    loaded = second.ask(*prompts, max_tokens=40)
    assert [answer.tokens for answer in loaded] == [answer.tokens for answer in computed]
    # All full blocks but the last where nothing would be left to compute.
    assert [answer.cached for answer in loaded] == [992, 288, 32, 0]

    # Blocks that only decoding filled were saved too: 1000 + 39 tokens are 32 full blocks.
    second.forget()
    (longer,) = second.ask(prompts[0] + computed[0].tokens)
    assert longer.cached == 1024

    # A reset of the connector tells of weights changed in place: nothing is shared any more.
    second.forget(connector=True)
    assert [answer.cached for answer in second.ask(*prompts)] == [0, 0, 0, 0]
    second.stop()

    changed = start_engine(node.home, model=other_weights)
    assert [answer.cached for answer in changed.ask(*prompts)] == [0, 0, 0, 0]


def test_other_block_size_chunked_prefill_preemption_and_no_prefix_cache(
    start_node: Callable[..., MemoryNode],
    start_engine: Callable[..., Engine],
    prompt: Prompt,
    until: Callable[..., None],
) -> None:
    node = start_node()
    engine = start_engine(
        node.home,
        block_size=128,
        max_num_batched_tokens=256,
        num_gpu_blocks_override=20,  # 2,432 tokens for 3,200
        enable_prefix_caching=False,
    )
    prompts = [prompt(700, seed) for seed in range(4)]
    computed = engine.ask(*prompts, max_tokens=100)
    until(lambda: node.shards() == 4 * 6)
    loaded = engine.ask(*prompts, max_tokens=100)
    assert [answer.tokens for answer in loaded] == [answer.tokens for answer in computed]
    assert [answer.cached for answer in loaded] == [640, 640, 640, 640]


def test_a_hit_counts_only_if_every_rank_holds_it(
    start_node: Callable[..., MemoryNode],
    start_engine: Callable[..., Engine],
    prompt: Prompt,
    until: Callable[..., None],
) -> None:
    node = start_node()
    engine = start_engine(node.home, tensor_parallel_size=2, enable_prefix_caching=False)
    prompts = [prompt(1000, 1), prompt(500, 2)]
    computed = engine.ask(*prompts)
    until(lambda: node.shards() == 2 * (31 + 15))
    loaded = engine.ask(*prompts)
    assert [answer.cached for answer in loaded] == [992, 480]
    assert loaded[0].tokens == computed[0].tokens

    fingerprint, parts = engine.keys(prompts[0])
    assert len(parts) == 2
    with connect(node.home) as fabric:
        room = fabric.open(Namespace("default", fingerprint))
        chains = [[Key(key) for key in keys] for keys in parts]
        assert [room.match(keys).matched for keys in chains] == [31, 31]
        room.purge(chains[1][10:11])  # and what continues it
        assert [room.match(keys).matched for keys in chains] == [31, 10]

    again = engine.ask(*prompts)
    assert [answer.cached for answer in again] == [320, 480]
    assert [answer.tokens for answer in again] == [answer.tokens for answer in computed]
    engine.stop()  # killed, its ranks would leave their shared memory behind
