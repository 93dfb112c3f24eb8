"""vLLM computes requests that its own KV memory could not hold: their KV lies on a node."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.engines.conftest import Engine, MemoryNode

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

Prompt = Callable[[int, int], list[int]]

BLOCK_BYTES = 32 * 2 * 32 * 2 * 4 * 4  # tokens, KV heads, dim, K and V, float32, layers
BLOCKS = 8  # of the engine's own: 256 tokens
LENGTHS = (1500, 900, 40, 700)
LIMITS = {"max_num_batched_tokens": 128, "max_num_seqs": 4, "enable_prefix_caching": False}


def context(**given: Any) -> dict[str, Any]:
    """Arguments of an engine whose KV lies elsewhere."""
    transfer = {
        "kv_connector": "KVFabricContextConnector",
        "kv_connector_module_path": "kvfabric_client.integrations.vllm_context",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
    }
    extra = given.pop("extra")
    return {
        **LIMITS,
        "kv_cache_memory_bytes": BLOCKS * BLOCK_BYTES,
        "kv_transfer_config": {**transfer, "kv_connector_extra_config": extra},
        **given,
    }


def test_requests_outgrow_the_engines_memory_and_answer_the_same(
    start_node: Callable[..., MemoryNode], start_engine: Callable[..., Engine], prompt: Prompt
) -> None:
    node = start_node()
    prompts = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    plain = start_engine(node.home, kv_transfer_config=None, **LIMITS)
    wanted = plain.ask(*prompts, max_tokens=40)
    plain.stop()
    small = start_engine(node.home, **context(extra={"home": node.home}))
    answers = small.ask(*prompts, max_tokens=40)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in wanted]
    again = small.ask(prompts[0], max_tokens=40)[0]
    assert again.tokens == wanted[0].tokens
    assert again.cached >= 1500 // 32 * 32  # what the fabric has is not computed again
    small.stop()
    assert node.is_at_rest()


def test_a_request_whose_kv_is_lost_ends_with_an_error_and_the_engine_goes_on(
    start_node: Callable[..., MemoryNode],
    start_engine: Callable[..., Engine],
    prompt: Prompt,
    until: Callable[..., None],
) -> None:
    node = start_node()
    engine = start_engine(node.home, **context(extra={"home": node.home}))
    engine.begin(prompt(1500, 1), max_tokens=500)
    until(lambda: node.shards() > 20)
    node.kill()
    assert engine.answers()[0].finish == "error"
    start_node()  # at the same address, and empty
    answer = engine.ask(prompt(300, 2), max_tokens=8)[0]
    assert answer.finish == "length"
    engine.stop()


@pytest.mark.exhaustive
def test_requests_for_which_nodes_have_no_room_end_with_an_error_and_others_go_on(
    start_node: Callable[..., MemoryNode], start_engine: Callable[..., Engine], prompt: Prompt
) -> None:
    node = start_node(memory=f"{128 * BLOCK_BYTES >> 20}MiB")
    engine = start_engine(node.home, **context(extra={"home": node.home}))
    prompts = [prompt(length, seed) for seed, length in enumerate((1900, 300, 1900, 64, 1900))]
    answers = engine.ask(*prompts, max_tokens=100)
    assert {answer.finish for answer in answers} == {"length", "error"}
    assert [answers[1].finish, answers[3].finish] == ["length"] * 2
    for short in (1, 3):
        assert engine.ask(prompts[short], max_tokens=100)[0].tokens == answers[short].tokens
    engine.stop()
    assert node.is_at_rest()


@pytest.mark.exhaustive
def test_an_engine_that_keeps_a_prefix_cache_of_its_own_does_not_start(
    start_node: Callable[..., MemoryNode], start_engine: Callable[..., Engine]
) -> None:
    node = start_node()
    arguments = context(extra={"home": node.home}, enable_prefix_caching=True)
    with pytest.raises(pytest.fail.Exception, match="enable_prefix_caching=False"):
        start_engine(node.home, **arguments)
