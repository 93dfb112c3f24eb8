"""Prefixes of a DynamicCache through a real node. Loaded and computed KV agree in float32."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvfabric_client
from kvfabric.errors import Refused, Unsupported
from kvfabric_client import Client
from kvfabric_client.integrations.transformers import PrefixStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

BLOCK_TOKENS = 16
VOCABULARY = 97
# The tail is computed in other shapes than with the whole prompt: float32 sums in another order.
TOLERANCE = 1e-5


@pytest.fixture
def node(start_node: Callable[..., Any]) -> Any:
    return start_node()


@pytest.fixture
def fabric(node: Any) -> Iterator[Client]:
    with kvfabric_client.connect(node.home) as client:
        yield client


def llama(seed: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def text(tokens: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=tokens)


def store(fabric: Client, model: Any, **options: Any) -> PrefixStore:
    return PrefixStore(fabric, model, block_tokens=BLOCK_TOKENS, **options)


@torch.no_grad()
def continued(model: Any, cache: DynamicCache, tokens: list[int]) -> torch.Tensor:
    """The last token's logits; the cache then holds `tokens` too."""
    logits: torch.Tensor = model(torch.tensor([tokens]), past_key_values=cache).logits[0, -1]
    return logits


def computed(model: Any, tokens: list[int]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    continued(model, cache, tokens)
    return cache


def greedy(model: Any, cache: DynamicCache, tokens: list[int], count: int) -> list[int]:
    answer = [int(continued(model, cache, tokens).argmax())]
    while len(answer) < count:
        answer.append(int(continued(model, cache, answer[-1:]).argmax()))
    return answer


def test_a_restored_prefix_gives_the_logits_and_the_tokens_of_a_computed_one(
    fabric: Client,
) -> None:
    model, prompt = llama(), text(100)
    assert store(fabric, model).store(computed(model, prompt), prompt) == 96

    cache, tokens = store(fabric, llama()).restore(prompt)  # a model of its own, equal weights
    logits = continued(model, cache, prompt[tokens:])

    assert tokens == 96
    expected = continued(model, DynamicCache(config=model.config), prompt)
    assert torch.allclose(logits, expected, rtol=0, atol=TOLERANCE)
    again, _ = store(fabric, model).restore(prompt)
    assert greedy(model, again, prompt[tokens:], 32) == greedy(
        model, DynamicCache(config=model.config), prompt, 32
    )


def test_what_is_generated_on_a_restored_cache_does_not_change_what_is_stored(
    fabric: Client,
) -> None:
    model, prompt = llama(), text(50)
    prefixes = store(fabric, model)
    prefixes.store(computed(model, prompt), prompt)
    first, tokens = prefixes.restore(prompt)
    before = [layer.keys.clone() for layer in first.layers]

    greedy(model, first, prompt[tokens:], 8)
    for layer in first.layers:
        layer.keys.zero_()
    second, _ = prefixes.restore(prompt)

    assert all(
        torch.equal(layer.keys, keys) for layer, keys in zip(second.layers, before, strict=True)
    )


def test_only_the_blocks_that_two_prompts_share_are_restored(fabric: Client) -> None:
    model, prompt = llama(), text(80)
    prefixes = store(fabric, model)
    prefixes.store(computed(model, prompt), prompt)

    other = prompt[:40] + text(40, seed=2)
    cache, tokens = prefixes.restore(other)

    assert (tokens, cache.get_seq_length()) == (32, 32)


def test_a_longer_prompt_adds_only_what_is_new(fabric: Client) -> None:
    model, prompt = llama(), text(96)
    prefixes = store(fabric, model)
    assert prefixes.store(computed(model, prompt[:48]), prompt[:48]) == 48
    before = _commits(fabric)

    assert prefixes.store(computed(model, prompt), prompt) == 96

    assert _commits(fabric) - before == 3


def test_one_token_is_always_left_to_compute(fabric: Client) -> None:
    model, prompt = llama(), text(48)
    prefixes = store(fabric, model)
    prefixes.store(computed(model, prompt), prompt)

    assert prefixes.restore(prompt)[1] == 32
    assert prefixes.restore(prompt[:1])[1] == 0


def test_bfloat16_comes_back_to_the_bit(fabric: Client) -> None:
    model, prompt = llama(dtype=torch.bfloat16), text(40)
    cache = computed(model, prompt)
    store(fabric, model).store(cache, prompt)

    restored, tokens = store(fabric, model).restore(prompt)

    for theirs, ours in zip(restored.layers, cache.layers, strict=True):
        assert torch.equal(theirs.keys, ours.keys[:, :, :tokens])
        assert torch.equal(theirs.values, ours.values[:, :, :tokens])


def test_changed_weights_never_hit(fabric: Client) -> None:
    model, prompt = llama(), text(64)
    prefixes = store(fabric, model)
    prefixes.store(computed(model, prompt), prompt)
    assert prefixes.restore(prompt)[1] == 48
    assert store(fabric, llama(seed=2)).restore(prompt)[1] == 0

    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3  # in place, one number

    assert prefixes.restore(prompt)[1] == 0


def test_salts_and_block_sizes_do_not_meet(fabric: Client) -> None:
    model, prompt = llama(), text(64)
    store(fabric, model).store(computed(model, prompt), prompt)

    assert store(fabric, model, salt=b"adapter").restore(prompt)[1] == 0
    assert PrefixStore(fabric, model, block_tokens=8).restore(prompt)[1] == 0


def test_without_a_node_nothing_is_restored_and_the_model_goes_on(node: Any) -> None:
    model, prompt = llama(), text(64)
    with kvfabric_client.connect(node.home) as fabric:
        prefixes = store(fabric, model, timeout_s=2.0)
        cache = computed(model, prompt)
        prefixes.store(cache, prompt)
        node.kill()

        restored, tokens = prefixes.restore(prompt)

        assert (tokens, restored.get_seq_length()) == (0, 0)
        assert prefixes.store(cache, prompt) == 0
        assert greedy(model, restored, prompt, 4) == greedy(
            model, DynamicCache(config=model.config), prompt, 4
        )


def test_caches_that_do_not_hold_the_prompt_are_refused(fabric: Client) -> None:
    model, prompt = llama(), text(64)
    prefixes = store(fabric, model)

    with pytest.raises(Refused, match="at least 64"):
        prefixes.store(computed(model, prompt[:40]), prompt)
    two = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([prompt, prompt]), past_key_values=two)
    with pytest.raises(Refused, match=r"\[1, 2"):
        prefixes.store(two, prompt)
    with pytest.raises(Refused, match="layers"):
        prefixes.store(DynamicCache(), prompt)


def test_models_that_do_not_keep_the_whole_kv_are_unsupported(fabric: Client) -> None:
    model = llama()
    model.config.sliding_window = 32
    model.config.layer_types = ["sliding_attention"] * 3

    with pytest.raises(Unsupported, match="full attention"):
        store(fabric, model)


def _commits(fabric: Client) -> float:
    return sum(
        counter.value
        for counter in fabric.stats().counters
        if counter.name.startswith("kvfabric_node_commits_total")
    )
