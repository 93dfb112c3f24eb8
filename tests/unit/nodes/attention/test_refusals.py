"""What a node refuses to attend, with words that name it; and what only looks like a fault."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.unit.client.conftest import Start, address
from tests.unit.nodes.attention.asking import SPACE, Asker, Call, Query, asker, check, ids, kv, rows

from kvfabric.errors import Denied, FabricError, Refused, Unsupported
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Format, Namespace
from kvfabric_client import Sequence
from kvfabric_nodes.attention.spans import SpanLimits
from kvfabric_nodes.node import Node

FORM = Format("bfloat16", block_tokens=16, layers=2, kv_heads=2, head_dim=8)
CONTEXT = kv(FORM, 40)
FAR = 1 << 60


@pytest.fixture
def ask(node: Node) -> Iterator[Asker]:
    with asker(address(node, "tcp")) as found:
        yield found


@pytest.fixture
def sequence(ask: Asker) -> Iterator[Sequence]:
    with ask.room.sequence(FORM) as made:
        made.append(ids(40), CONTEXT)
        yield made


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"packing": "vllm-amx"}, "vllm-amx"),
        ({"packing": ""}, "packed as ''"),
        ({"dtype": "int8"}, "int8"),
        ({"kind": "state"}, "state"),
        ({"kind": "mla"}, "one head"),
        ({"head_dim": 0}, "dimension of 0"),
        ({"head_dim": 1 << 20}, "above"),
        ({"layers": 3}, "3 layers"),
        ({"kv_heads": 4}, "layers and KV heads"),
        ({"block_tokens": 32}, "32 tokens"),
        ({"dtype": "float32", "head_dim": 4, "block_tokens": 16}, ""),  # equal in size: its word
    ],
)
def test_a_span_must_have_the_format_of_its_blocks(
    ask: Asker, sequence: Sequence, fields: dict[str, Any], why: str
) -> None:
    form = replace(FORM, **fields)
    if not why:
        ask.span_of(form, sequence.id)
        return
    with pytest.raises(Refused, match=why):
        ask.span_of(form, sequence.id)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "sequence or of keys"),
        ({"sequence": 1}, "no sequence 1"),
        ({"sequence": 5, "keys": [b"k" * 32]}, "sequence or of keys"),
        ({"keys": [b"k"], "first_tokens": [0]}, "has 1 bytes"),
        ({"keys": [b"k" * 32]}, "a first token each"),
        ({"keys": [b"k" * 32], "first_tokens": [0], "tokens": [17]}, "17 tokens"),
        ({"keys": [b"k" * 32], "first_tokens": [FAR]}, "the limit"),
        ({"keys": [b"k" * 32, b"l" * 32], "first_tokens": [16, 10]}, "two blocks at position 16"),
        ({"span": 99, "keys": [b"k" * 32], "first_tokens": [0]}, "no span 99"),
    ],
)
def test_a_span_must_be_of_something(ask: Asker, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(Refused, match=why):
        ask.span_of_keys(FORM, **fields)


def test_blocks_of_another_size_are_refused_when_they_are_there_and_when_they_come(
    ask: Asker, sequence: Sequence
) -> None:
    keys = [place.key for place in sequence.blocks() if place.key]
    small = replace(FORM, head_dim=4)
    with pytest.raises(Refused, match="a block of the span's format"):
        ask.span_of_keys(small, keys=keys, first_tokens=[0, 16])
    later = b"l" * 32
    span = ask.span_of_keys(small, keys=[later], first_tokens=[0]).span
    call = Call(small, [Query(span, rows(small, 1), 16, kv(small, 16))])
    assert len(ask.attend(call).gaps) == 1
    ask.room.put([later], [bytes(777)])  # type: ignore[list-item]
    with pytest.raises(Refused, match="777 bytes"):
        ask.attend(call)


def test_what_is_another_tenants_is_denied(node: Node, ask: Asker, sequence: Sequence) -> None:
    with asker(address(node, "tcp"), Namespace("b", SPACE.fingerprint)) as theirs:
        for fields in ({"sequence": sequence.id}, {"keys": [b"k" * 32], "first_tokens": [0]}):
            request = node_pb2.OpenSpanRequest(
                namespace_id=ask.room.id, format=FORM.to_proto(), **fields
            )
            with pytest.raises(Denied, match="not open in this session"):
                theirs.say("open_span", request)
        with pytest.raises(Denied):
            theirs.span_of(FORM, sequence.id)
    another = Asker(ask.client, Namespace(SPACE.tenant, b"g" * 32))
    with pytest.raises(Refused, match="not one of the namespace"):
        another.span_of(FORM, sequence.id)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"layer": 2}, "layer 2"),
        ({"query_heads": 3}, "3 query heads over 2"),
        ({"query_heads": 0}, "0 query heads"),
        ({"dtype": "float16"}, "queries of 'float16' over KV of bfloat16"),
        ({"dtype": "float32"}, "bytes of vectors"),
        ({"scale": math.nan}, "scale nan"),
        ({"scale": math.inf}, "scale inf"),
        ({"scale": 0.0}, "scale 0"),
        ({"softcap": -1.0}, "softcap -1"),
        ({"softcap": math.nan}, "softcap nan"),
        ({"vectors": b""}, "0 bytes of vectors"),
        ({"vectors": b"x" * 129}, "129 bytes of vectors"),
        ({"queries": []}, "0 queries"),
        ({"queries": [{"rows": 1}]}, "no span 0"),
        ({"rows": 0}, "no rows"),
        ({"rows": 3}, "bytes of vectors"),
        ({"rows": 1 << 31}, "an answer has at most"),
        ({"positions": [1]}, "1 positions for 2"),
        ({"positions": [FAR, 1]}, "the limit"),
        ({"visible": FAR}, "the limit"),
        ({"ranges": [1]}, "pairs"),
        ({"ranges": [3, 3]}, "pairs"),
        ({"ranges": [3, 5, 4, 8]}, "ascending"),
        ({"ranges": [3, FAR]}, "a range up to"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_by_name(
    ask: Asker, sequence: Sequence, fields: dict[str, Any], why: str
) -> None:
    span = ask.span_of(FORM, sequence.id)
    request = Call(FORM, [Query(span, rows(FORM, 2), 40, CONTEXT)]).message()
    for name, value in fields.items():
        of_query = name in ("rows", "positions", "visible", "ranges")
        part: Any = request.queries[0] if of_query else request
        if isinstance(value, list):
            part.ClearField(name)
            for one in value:
                getattr(part, name).add(**one) if isinstance(one, dict) else getattr(
                    part, name
                ).append(one)
        else:
            setattr(part, name, value)
    with pytest.raises(Refused, match=why):
        ask.say("attend", request)
    fine = Call(FORM, [Query(span, rows(FORM, 2), 40, CONTEXT)])
    check(ask.attend(fine), fine)


def test_all_queries_of_a_call_have_one_format(ask: Asker, sequence: Sequence) -> None:
    other = replace(FORM, head_dim=4)
    with ask.room.sequence(other) as second:
        second.append(ids(16, seed=1), kv(other, 16))
        spans = [ask.span_of(FORM, sequence.id), ask.span_of(other, second.id)]
        queries = [Query(span, rows(FORM, 1), 16, CONTEXT) for span in spans]
        with pytest.raises(Refused, match="different formats"):
            ask.attend(Call(FORM, queries))


def test_a_sequence_that_ended_and_a_span_that_was_closed(ask: Asker) -> None:
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(40), CONTEXT)
        span, other = (ask.span_of(FORM, sequence.id) for _ in range(2))
    with pytest.raises(Refused, match="no sequence"):
        ask.attend(Call(FORM, [Query(span, rows(FORM, 1), 40, CONTEXT)]))
    for _ in range(2):  # safe to repeat
        ask.say("close_span", node_pb2.CloseSpanRequest(spans=[span, 12345]))
    with pytest.raises(Refused, match=f"no span {span}"):
        ask.attend(Call(FORM, [Query(span, rows(FORM, 1), 40, CONTEXT)]))
    with pytest.raises(Refused, match="no sequence"):
        ask.attend(Call(FORM, [Query(other, rows(FORM, 1), 40, CONTEXT)]))


def test_what_a_layer_does_not_show_yet_is_a_gap(ask: Asker) -> None:
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(36), CONTEXT[..., :36, :])
        sequence.append(ids(40)[36:], CONTEXT[1, ..., 36:, :], layer=1)
        span = ask.span_of(FORM, sequence.id)
        ahead = Call(FORM, [Query(span, rows(FORM, 1), 40, CONTEXT)], layer=1)
        check(ask.attend(ahead), ahead)
        answer = ask.attend(replace(ahead, layer=0))
        assert [(gap.first_token, gap.end_token) for gap in answer.gaps] == [(36, 40)]
        assert list(answer.tokens) == [36]


def test_a_node_without_threads_for_kernels_says_so(start: Start) -> None:
    node = start(attention_threads=0)
    with asker(address(node, "unix")) as ask, pytest.raises(Unsupported, match="_threads"):
        ask.span_of(FORM, 1)


def test_too_many_spans_of_a_session(ask: Asker, node: Node, sequence: Sequence) -> None:
    most = node.attention.spans.limits.spans_of_session
    span = [ask.span_of(FORM, sequence.id) for _ in range(most)][-1]
    with pytest.raises(FabricError, match=f"{most} spans"):
        ask.span_of(FORM, sequence.id)
    ask.say("close_span", node_pb2.CloseSpanRequest(spans=[span]))
    ask.span_of(FORM, sequence.id)


def test_spans_of_sequences_that_ended_make_room_for_others(
    ask: Asker, node: Node, sequence: Sequence
) -> None:
    node.attention.spans.limits = SpanLimits(spans_of_session=3)
    kept = ask.span_of(FORM, sequence.id)
    for _ in range(3):
        with ask.room.sequence(FORM) as other:
            span = ask.span_of(FORM, other.id)
    ask.span_of(FORM, sequence.id)
    call = Call(FORM, [Query(kept, rows(FORM, 1), 40, CONTEXT)])
    check(ask.attend(call), call)
    ended = replace(call, queries=[replace(call.queries[0], span=span)])
    with pytest.raises(Refused, match="no s"):
        ask.attend(ended)
