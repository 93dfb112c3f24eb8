"""Every kind of attention, and random contexts in pieces at one node, against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.unit.client.conftest import Start, address
from tests.unit.client.test_grpc import Guest
from tests.unit.nodes.attention.asking import (
    Asker,
    Call,
    Query,
    asker,
    check,
    ids,
    kv,
    opening,
    rows,
)

from kvfabric.attention.floats import narrowed
from kvfabric.types import Format

Array = NDArray[Any]
DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kv_heads", "group", "dim"), [(4, 1, 64), (2, 4, 128), (1, 8, 64), (3, 3, 96)]
)
def test_heads_of_every_kind(ask: Asker, dtype: str, kv_heads: int, group: int, dim: int) -> None:
    form = Format(dtype, block_tokens=16, layers=2, kv_heads=kv_heads, head_dim=dim)
    context = kv(form, 100)
    with ask.room.sequence(form) as sequence:
        sequence.append(ids(100), context)
        span = ask.span_of(form, sequence.id)
        for query_dtype in ("", "float32"):
            chunk = Query(span, rows(form, 5, group), 100, context, range(95, 100))
            call = Call(form, [chunk], layer=1, dtype=query_dtype, scale=dim**-0.5)
            check(ask.attend(call), call)


@pytest.mark.parametrize("dtype", DTYPES)
def test_latents_are_keys_and_values_at_once(ask: Asker, dtype: str) -> None:
    form = Format(dtype, block_tokens=16, layers=2, kv_heads=1, head_dim=72, kind="mla")
    latents = narrowed(
        np.random.default_rng(1).standard_normal((2, 1, 1, 40, 72), np.float32), dtype
    )
    padded = np.zeros((2, 48, 72), latents.dtype)
    padded[:, :40] = latents[:, 0, 0]
    blocks = [np.ascontiguousarray(padded[:, at : at + 16]) for at in (0, 16, 32)]
    keys = [bytes([number]) * 32 for number in range(3)]
    ask.room.put(keys, blocks, layers=2)  # type: ignore[arg-type]
    fields = {"first_tokens": [0, 16, 32], "tokens": [16, 16, 8], "value_dim": 64}
    span = ask.span_of_keys(form, keys=keys, **fields).span
    query = Query(span, rows(form, 3, group=16), 40, latents, [5, 38, 39])
    for layer in range(2):
        call = Call(form, [query], layer=layer, value_dim=64, softcap=5.0)
        check(ask.attend(call), call)


def test_forks_share_blocks_and_each_sees_its_own_tail(ask: Asker) -> None:
    form = Format("float32", block_tokens=16, layers=1, kv_heads=2, head_dim=16)
    shared = kv(form, 64)
    with ask.room.sequence(form) as sequence:
        sequence.append(ids(64), shared)
        forks = [sequence.fork(64, tentative=number < 2) for number in range(4)]
        queries = []
        for number, fork in enumerate(forks):
            own = kv(form, 3 + number, seed=number + 1)
            fork.append(ids(3 + number, seed=number), own)
            context = np.concatenate([shared, own], axis=-2)
            length = 64 + 3 + number
            span = ask.span_of(form, fork.id)
            queries.append(Query(span, rows(form, 1 + number, seed=number), length, context))
        call = Call(form, queries)
        answer = ask.attend(call)
        check(answer, call)
        assert answer.stacked == 4
        per_token = 2 * 2 * 16 * 4
        assert answer.read_bytes == (64 + 3 + 4 + 5 + 6) * per_token
        for fork in forks:
            fork.close()


def test_the_same_over_grpc(start: Start) -> None:
    node = start(grpc="127.0.0.1:0")
    form = Format("bfloat16", block_tokens=16, layers=1, kv_heads=2, head_dim=16)
    context = kv(form, 40)
    guest = Guest(node)
    with asker(address(node, "unix")) as ask, ask.room.sequence(form) as sequence:
        sequence.append(ids(40), context)
        span = guest.call("OpenSpan", opening(guest.space, form, sequence.id)).span
        call = Call(form, [Query(span, rows(form, 2), 40, context)])
        check(guest.call("Attend", call.message()), call)
    guest.channel.close()


@st.composite
def asked(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[int], dict[str, Any]]:
    """Ranges, positions, and what else a call says, over a context of 120 tokens."""
    bounds = sorted(draw(st.sets(st.integers(0, 120), max_size=8)))
    ranges = list(zip(bounds[::2], bounds[1::2], strict=False))
    positions = draw(st.lists(st.integers(0, 130), max_size=4))
    fields = {
        "window": draw(st.sampled_from([0, 0, 1, 30])),
        "sinks": draw(st.sampled_from([0, 5])),
        "softcap": draw(st.sampled_from([0.0, 3.0])),
        "layer": draw(st.integers(0, 1)),
        "dtype": draw(st.sampled_from(["", "float32"])),
    }
    return ranges, positions, fields


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(asked(), min_size=1, max_size=3), st.integers(0, 120), st.sampled_from(DTYPES))
def test_whatever_is_asked_of_a_context_is_what_the_oracle_says(
    ask: Asker,
    several: list[tuple[list[tuple[int, int]], list[int], dict[str, Any]]],
    visible: int,
    dtype: str,
) -> None:
    form = Format(dtype, block_tokens=8, layers=2, kv_heads=2, head_dim=8)
    context = kv(form, 120)
    with ask.room.sequence(form) as sequence:
        sequence.append(ids(120, seed=DTYPES.index(dtype)), context)
        keys = [place.key for place in sequence.blocks() if place.key]
        places = [8 * number for number in range(len(keys))]
        spans = [
            ask.span_of(form, sequence.id),
            ask.span_of_keys(form, keys=keys, first_tokens=places).span,
        ]
        queries = [
            Query(
                spans[number % 2],
                rows(form, len(positions) or 1, seed=number),
                visible,
                context,
                positions,
                ranges,
            )
            for number, (ranges, positions, _) in enumerate(several)
        ]
        call = Call(form, queries, **several[0][2])
        check(ask.attend(call), call)
