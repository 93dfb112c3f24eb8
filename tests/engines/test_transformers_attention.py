"""Models that decode while their KV lies on real nodes: the same greedy tokens in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.client.conftest import counter
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import kvfabric_client
from kvfabric.errors import Refused, Retry, Unsupported
from kvfabric_client import Client, Room
from kvfabric_client.demo.cluster import Cluster, cluster
from kvfabric_client.integrations.transformers import (
    PrefixStore,
    fabric_attention,
    model_format,
    model_namespace,
)
from kvfabric_nodes.attention.kernels import native

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

BLOCK_TOKENS = 16
VOCABULARY = 97
SEGMENT_BYTES = 64 << 10
# Logits of a few units; float32 sums in another order, over three layers.
TOLERANCE = 2e-4

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mha": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "gqa": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2}),
    "mqa": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),
    "windows": (
        MistralForCausalLM,
        MistralConfig,
        {"num_key_value_heads": 2, "sliding_window": 20},
    ),
    "windows in every other layer, and a soft-cap": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 24,
            "attn_logit_softcapping": 5.0,
        },
    ),
}


def build(kind: str = "gqa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    made, config, own = MODELS[kind]
    torch.manual_seed(1)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    return made(config(**(settings | own | changes))).to(dtype).eval()


def batch(*lengths: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded at the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def greedy(model: Any, prompts: dict[str, torch.Tensor], count: int = 40, **options: Any) -> Any:
    return model.generate(
        **prompts,
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    ).tolist()


@pytest.fixture
def fabric(start_node: Callable[..., Any]) -> Iterator[Client]:
    with kvfabric_client.connect(start_node().home) as client:
        yield client


def room_of(fabric: Client, model: Any) -> Room:
    return fabric.open(model_namespace(model, block_tokens=BLOCK_TOKENS))


def on_fabric(fabric: Client, model: Any, **options: Any) -> Any:
    return fabric_attention(model, room_of(fabric, model), block_tokens=BLOCK_TOKENS, **options)


@pytest.mark.parametrize("kind", MODELS)
def test_the_tokens_are_those_of_the_model_alone(fabric: Client, kind: str) -> None:
    model, prompts = build(kind), batch(37, 50, 1)
    expected = greedy(model, prompts)

    with on_fabric(fabric, model) as cache:
        whole = greedy(model, prompts, past_key_values=cache)
        assert cache.held_bytes == 0
        assert cache.totals.tokens["n0"] > 0
    with on_fabric(fabric, model) as cache:
        in_chunks = greedy(model, prompts, past_key_values=cache, prefill_chunk_size=12)
    with on_fabric(fabric, model, local_tokens=10) as cache:
        beside_local = greedy(model, prompts, past_key_values=cache, prefill_chunk_size=12)
        # What is kept is less than the local tokens and a block, per row.
        token_bytes = 2 * 4 * model_format(model).kv_heads * 16 * 3
        assert 0 < cache.held_bytes < 3 * (10 + BLOCK_TOKENS) * token_bytes

    assert whole == in_chunks == beside_local == expected
    assert model.config._attn_implementation == "sdpa"
    assert greedy(model, prompts) == expected


@torch.no_grad()
def test_logits_are_the_models_own_but_for_rounding(fabric: Client) -> None:
    model, prompts = build(), batch(70)
    expected = model(**prompts).logits

    with on_fabric(fabric, model) as cache:
        first = model(prompts["input_ids"][:, :40], past_key_values=cache).logits
        rest = model(prompts["input_ids"][:, 40:], past_key_values=cache).logits

    found = torch.cat([first, rest], dim=1)
    assert torch.allclose(found, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_bfloat16_stays_within_its_own_rounding(fabric: Client) -> None:
    exact, model, prompts = build(), build(dtype=torch.bfloat16), batch(60)
    wanted = exact(**prompts).logits[0, 30:]
    alone = (model(**prompts).logits[0, 30:].float() - wanted).abs().max()

    with on_fabric(fabric, model, local_tokens=8) as cache:
        model(prompts["input_ids"][:, :30], past_key_values=cache)
        found = model(prompts["input_ids"][:, 30:], past_key_values=cache).logits[0].float()

    assert (found - wanted).abs().max() < 2 * alone


def test_a_conversation_goes_on_and_guesses_are_taken_back(fabric: Client) -> None:
    model, prompts = build(), batch(30)
    expected = greedy(model, prompts, 60)

    with on_fabric(fabric, model) as cache:
        turn = greedy(model, prompts, 20, past_key_values=cache, prompt_lookup_num_tokens=4)
        found = greedy(model, {"input_ids": torch.tensor(turn)}, 40, past_key_values=cache)

    assert found == expected


@pytest.mark.skipif(not native.available(), reason="no native kernel here")
@pytest.mark.parametrize("kind", ["gqa", "windows"])
def test_a_row_alone_is_decoded_by_what_nodes_have_prepared(fabric: Client, kind: str) -> None:
    model, prompts = build(kind), batch(30)
    with on_fabric(fabric, model) as cache:
        found = greedy(model, prompts, past_key_values=cache)
    assert found == greedy(model, prompts)
    assert counter(fabric, "kvfabric_node_attends_prepared_total") > 0


def test_what_was_decoded_here_another_process_restores_as_a_prefix(fabric: Client) -> None:
    model, prompts = build(), batch(40)
    with on_fabric(fabric, model) as cache:
        (text,) = greedy(model, prompts, 30, past_key_values=cache)

    restored, tokens = PrefixStore(fabric, build(), block_tokens=BLOCK_TOKENS).restore(text)

    assert tokens == 64
    expected = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([text[:tokens]]), past_key_values=expected)
    for ours, theirs in zip(restored.layers, expected.layers, strict=True):
        assert torch.allclose(ours.keys, theirs.keys, rtol=0, atol=TOLERANCE)
        assert torch.allclose(ours.values, theirs.values, rtol=0, atol=TOLERANCE)


def test_a_call_that_failed_may_be_repeated(
    fabric: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = build(), batch(50)
    expected = greedy(model, prompts)
    third = model.model.layers[2]

    with on_fabric(fabric, model, local_tokens=10) as cache, torch.no_grad():
        with monkeypatch.context() as patched:
            patched.setattr(third, "forward", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**prompts, past_key_values=cache)
        assert cache.get_seq_length() == 0
        assert greedy(model, prompts, past_key_values=cache) == expected


@pytest.mark.parametrize("local_tokens", [0, 10])
@pytest.mark.parametrize("before", [0, 20])
def test_after_a_call_that_failed_another_may_come(
    fabric: Client, monkeypatch: pytest.MonkeyPatch, local_tokens: int, before: int
) -> None:
    """What some layers have stored of the first is not in the way."""
    model, failing, prompts = build(), batch(50, seed=2), batch(50)
    expected = greedy(model, prompts)
    third = model.model.layers[2]

    with on_fabric(fabric, model, local_tokens=local_tokens) as cache, torch.no_grad():
        if before:
            model(prompts["input_ids"][:, :before], past_key_values=cache)
        with monkeypatch.context() as patched:
            patched.setattr(third, "forward", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(failing["input_ids"][:, before:], past_key_values=cache)
        assert greedy(model, prompts, past_key_values=cache) == expected


def test_a_home_without_room_costs_time_but_no_kv(
    fabric: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = build(), batch(50)
    expected = greedy(model, prompts)

    with on_fabric(fabric, model, local_tokens=10) as cache, torch.no_grad():
        model(prompts["input_ids"][:, :20], past_key_values=cache)
        with monkeypatch.context() as patched:
            patched.setattr(cache.rows[0].sequence, "append", no_room)
            with pytest.raises(Retry):
                model(prompts["input_ids"][:, 20:40], past_key_values=cache)
        assert greedy(model, prompts, past_key_values=cache) == expected
        assert not cache.totals.recomputed


def no_room(*_: Any, **__: Any) -> None:
    raise Retry("no room")


def test_rows_that_could_not_all_be_opened_are_opened_by_the_next_call(
    fabric: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = build(), batch(40, 40)
    expected = greedy(model, prompts)
    room = room_of(fabric, model)
    open_one = room.sequence

    with fabric_attention(model, room, block_tokens=BLOCK_TOKENS) as cache:
        with monkeypatch.context() as patched, torch.no_grad():
            first = iter([open_one])
            patched.setattr(room, "sequence", lambda *given: next(first, no_room)(*given))
            with pytest.raises(Retry):
                model(**prompts, past_key_values=cache)
        assert greedy(model, prompts, past_key_values=cache) == expected


@torch.no_grad()
def test_a_chunk_of_padding_brings_nothing(fabric: Client) -> None:
    model, prompts = build(), batch(30)
    expected = model(**prompts).logits
    padded = torch.nn.functional.pad(prompts["input_ids"], (8, 0))
    mask = torch.nn.functional.pad(prompts["attention_mask"], (8, 0))

    with on_fabric(fabric, model) as cache:
        model(padded[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
        found = model(
            padded[:, 8:],
            attention_mask=mask,
            position_ids=torch.arange(30)[None],
            past_key_values=cache,
        ).logits

    assert torch.allclose(found, expected, rtol=0, atol=TOLERANCE)


# Loss ---------------------------------------------------------------------------------


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    """A home for a few blocks of the gqa model, and lenders with room for what goes beyond."""
    memory = {"home": 2 * SEGMENT_BYTES, "east": 16 * SEGMENT_BYTES, "west": 16 * SEGMENT_BYTES}
    with cluster(memory, SEGMENT_BYTES, tmp_path) as found:
        yield found


def test_lost_kv_is_computed_again_and_the_answer_stays_the_same(nodes: Cluster) -> None:
    model, prompts = build(), batch(200, 150)
    expected = greedy(model, prompts, 60)

    with (
        kvfabric_client.connect(nodes.unix("home"), timeout_s=20.0) as fabric,
        on_fabric(fabric, model) as cache,
    ):
        some = greedy(model, prompts, 30, past_key_values=cache, prefill_chunk_size=16)
        assert cache.totals.tokens["east"] + cache.totals.tokens["west"] > 0
        lender = max(("east", "west"), key=lambda node: cache.totals.tokens.get(node, 0))
        nodes.nodes[lender].kill()
        mask = torch.cat([prompts["attention_mask"], torch.ones(2, 30, dtype=torch.long)], dim=1)
        said = {"input_ids": torch.tensor(some), "attention_mask": mask}
        found = greedy(model, said, 30, past_key_values=cache)
        assert cache.totals.recomputed > 0

    assert found == expected


@pytest.mark.parametrize("local_tokens", [0, 20])
def test_a_home_that_dies_between_two_layers_costs_what_lay_there(
    nodes: Cluster, local_tokens: int
) -> None:
    model, prompts = build(), batch(90)
    expected = greedy(model, prompts, 60)

    def kill(*_: Any) -> None:
        hook.remove()
        nodes.nodes["east"].kill()

    with (
        kvfabric_client.connect(nodes.unix("east"), timeout_s=20.0) as fabric,
        on_fabric(fabric, model, local_tokens=local_tokens) as cache,
    ):
        some = greedy(model, prompts, 30, past_key_values=cache)
        (row,) = cache.rows
        assert row.sequence.node == "east"
        lay_there = row.sequence.length
        hook = model.model.layers[1].register_forward_pre_hook(kill)
        found = greedy(model, {"input_ids": torch.tensor(some)}, 30, past_key_values=cache)
        assert row.sequence.node != "east"
        assert cache.totals.recomputed >= lay_there

    assert found == expected


# Refusals -----------------------------------------------------------------------------


def test_what_is_not_attended_on_the_fabric_is_refused_by_name(fabric: Client) -> None:
    model, prompts = build(), batch(20, 10)
    ids = prompts["input_ids"]
    with on_fabric(fabric, model) as cache, torch.no_grad():
        with pytest.raises(Refused, match="pass past_key_values"):
            model(ids)
        with pytest.raises(Refused, match="pad at the left"):
            model(ids, attention_mask=prompts["attention_mask"].flip(1), past_key_values=cache)
        mask = torch.ones(2, 1, 20, 20, dtype=torch.bool)
        with pytest.raises(Refused, match="with 0 for padding at the left"):
            model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(Refused, match="call the model with input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
        with pytest.raises(Unsupported, match="beams"):
            greedy(model, prompts, 3, past_key_values=cache, num_beams=2)
        cache.reset()
        with pytest.raises(Refused, match="row 1 goes on with token 0, at position 10 by"):
            model(**prompts, past_key_values=cache)
        model(ids, past_key_values=cache)
        with pytest.raises(Refused, match=r"give \[2, 40\]"):  # the whole prompt, once more
            model(ids, attention_mask=torch.ones(2, 20), past_key_values=cache)
        with pytest.raises(Refused, match="give each token once"):
            model(ids, position_ids=torch.arange(20)[None], past_key_values=cache)
        with pytest.raises(Refused, match="a batch of 1 rows"):
            model(ids[:1], past_key_values=cache)
        with torch.enable_grad(), pytest.raises(Unsupported, match="for inference"):
            model(ids, past_key_values=cache)


def test_models_that_attend_to_something_else_are_refused(fabric: Client) -> None:
    room = room_of(fabric, build())
    chunked = build(attention_chunk_size=16)
    with pytest.raises(Unsupported, match="chunked attention"), fabric_attention(chunked, room):
        pass
    sinks = GptOssForCausalLM(
        GptOssConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=2,
        )
    ).eval()
    with (
        on_fabric(fabric, sinks) as cache,
        torch.no_grad(),
        pytest.raises(Unsupported, match="learned attention sinks"),
    ):
        sinks(batch(20)["input_ids"], past_key_values=cache)
