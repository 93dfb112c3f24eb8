"""What prepared queries answer is what an attend does."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.client.conftest import Start, address, counter
from tests.unit.nodes.attention.asking import Asker, Call, Query, asker, ids, kv, rows
from tests.unit.nodes.attention.prepared.again import CONTEXT, FORM, Again, over, soon

from kvfabric.types import Format, Key
from kvfabric_client.prepared import BUSY, GONE, Computed
from kvfabric_nodes.node import Node


def test_it_is_asked_in_every_layer_and_sees_what_is_appended(ask: Asker, again: Again) -> None:
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(40), CONTEXT[..., :40, :])
        span = ask.span_of(FORM, sequence.id)
        number = again.prepare(over(span, 40))
        assert number
        for visible in range(40, 48):
            for layer in range(FORM.layers):
                done = again.check(number, replace(over(span, visible, seed=visible), layer=layer))
                assert done.tokens == visible
                assert done.read_bytes == visible * 2 * 2 * 8 * 4
            sequence.append(ids(1), CONTEXT[..., visible : visible + 1, :])
        again.check(number, over(span, 13))  # less than it was prepared for
        assert again(number, over(span, 49)) == GONE  # no block for it when it was prepared
        again.check(again.prepare(over(span, 48)), over(span, 48))
        assert counter(ask.client, "kvfabric_node_attends_prepared_total") == 26
        assert counter(ask.client, "kvfabric_node_attended_rows_total") == 28


def test_a_layer_is_seen_as_far_as_it_is_written(ask: Asker, again: Again) -> None:
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(40), CONTEXT[..., :40, :])
        span = ask.span_of(FORM, sequence.id)
        number = again.prepare(over(span, 40))
        new = CONTEXT[..., 40:42, :]
        sequence.append(ids(2), new[0], layer=0)
        again.check(number, over(span, 42))
        assert again(number, replace(over(span, 41), layer=1)) == GONE
        for layer in (1, 2):
            sequence.append(ids(2), new[layer], layer=layer, start=40)
            again.check(number, replace(over(span, 42), layer=layer))


OPTIONS: list[dict[str, object]] = [
    {"softcap": 3.0, "scale": 0.5},
    {"window": 20},
    {"window": 20, "sinks": 4},
    {"window": 500, "sinks": 4},
    {"dtype": "float32", "form": replace(FORM, dtype="bfloat16")},
    {"form": replace(FORM, dtype="float16")},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("count", [1, 5])
def test_it_is_as_it_was_prepared(
    ask: Asker, again: Again, options: dict[str, object], count: int
) -> None:
    form = options.get("form", FORM)
    assert isinstance(form, Format)
    context = kv(form, 90)
    with ask.room.sequence(form) as sequence:
        sequence.append(ids(90), context)
        span = ask.span_of(form, sequence.id)

        def call(visible: int, layer: int) -> Call:
            query = Query(span, rows(form, count, seed=visible), visible, context)
            return replace(Call(form, [query], layer), **options)  # type: ignore[arg-type]

        number = again.prepare(call(70, 0))
        assert number
        for visible in (90, 70, 21, 20, 5, 1, 0):
            told = ask.attend(call(visible, 2))
            assert again.check(number, call(visible, 2)).tokens == sum(told.tokens)


def test_latents_are_read_once(ask: Asker, again: Again) -> None:
    form = Format("float32", 16, layers=2, kv_heads=1, head_dim=12, kind="mla")
    context = np.random.default_rng(3).standard_normal((2, 1, 1, 40, 12), np.float32)
    with ask.room.sequence(form) as sequence:
        sequence.append(ids(40), context)
        span = ask.span_of(form, sequence.id, value_dim=8)
        vectors = np.random.default_rng(1).standard_normal((1, 4, 12), np.float32)
        call = Call(form, [Query(span, vectors, 40, context)], layer=1, value_dim=8)
        done = again.check(again.prepare(call), call)
        assert done.read_bytes == 40 * 12 * 4


def test_ranges_go_on_where_they_ended_with_what_was_seen(ask: Asker, again: Again) -> None:
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(70), CONTEXT[..., :70, :])
        span = ask.span_of(FORM, sequence.id)

        def call(visible: int, *ranges: tuple[int, int]) -> Call:
            return Call(FORM, [replace(over(span, visible).queries[0], ranges=ranges)])

        open_ended = again.prepare(call(68, (3, 10), (40, 68)))
        again.check(open_ended, call(70, (3, 10), (40, 70)))
        again.check(open_ended, call(45, (3, 10), (40, 45)))
        closed = again.prepare(call(70, (3, 10), (40, 60)))
        done = again.check(closed, call(65, (3, 10), (40, 60)))
        assert done.tokens == 7 + 20


def test_shards_are_asked_by_their_keys(ask: Asker, again: Again) -> None:
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(64), CONTEXT[..., :64, :])
        keys = [place.key for place in sequence.blocks() if place.key]
        first, hole = [0, 16, 32, 48], Key(b"x" * 32)
        span = ask.span_of_keys(FORM, keys=keys, first_tokens=first).span
        number = again.prepare(over(span, 64))
        again.check(number, over(span, 64))
        assert again.check(number, over(span, 20)).tokens == 20
        far = replace(over(span, 1000).queries[0], context=CONTEXT[..., :64, :])
        again.check(number, Call(FORM, [far]))  # its own tokens, whatever there is behind
        holed = ask.span_of_keys(FORM, keys=[*keys, hole], first_tokens=[*first, 64]).span
        assert not again.prepare(over(holed, 70)), "not all of it is here"
        assert not again.prepare(over(holed, 64)), "nor would it be, further on"


def test_what_cannot_be_prepared_is_answered_all_the_same(ask: Asker, again: Again) -> None:
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(40), CONTEXT[..., :40, :])
        span = ask.span_of(FORM, sequence.id)
        one = over(span, 40).queries[0]
        for queries in ([one, one], [replace(one, positions=[39])]):
            assert not again.prepare(Call(FORM, queries))


def test_while_another_is_computed_it_is_busy(ask: Asker, again: Again, node: Node) -> None:
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(40), CONTEXT[..., :40, :])
        call = over(ask.span_of(FORM, sequence.id), 40)
        number = again.prepare(call)
        assert node.attention.preparations is not None
        with node.attention.preparations.turn():
            assert again(number, call) == BUSY
        again.check(number, call)
        assert counter(ask.client, 'kvfabric_node_attend_refusals_total{reason="busy"}') == 1


def test_several_may_be_begun_before_the_first_is_finished(ask: Asker, again: Again) -> None:
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(40), CONTEXT[..., :40, :])
        span = ask.span_of(FORM, sequence.id)
        number = again.prepare(over(span, 40))
        asked = [number, 17, number, 18, number]
        for name in asked:
            again.begin(name, over(span, 40))
        verdicts = [again.connection.finish(soon()) for _ in asked]
        assert [isinstance(v, Computed) or v for v in verdicts] == [True, GONE, True, GONE, True]


@st.composite
def asked(draw: st.DrawFn) -> tuple[list[tuple[int, int]], dict[str, Any], int, list[int]]:
    """Ranges and options of a query over 96 tokens, what it sees first, and what later."""
    bounds = sorted(draw(st.sets(st.integers(0, 96), max_size=6)))
    ranges = list(zip(bounds[::2], bounds[1::2], strict=False))
    options = {
        "window": draw(st.sampled_from([0, 1, 7, 40, 200])),
        "sinks": draw(st.sampled_from([0, 3, 50])),
    }
    first = draw(st.sampled_from([96, 48, *(end for _, end in ranges)]))
    return ranges, options, first, draw(st.lists(st.integers(0, 100), min_size=1, max_size=6))


@pytest.mark.parametrize("by_keys", [False, True])
def test_whatever_was_prepared_is_what_an_attend_answers(start: Start, by_keys: bool) -> None:
    node = start(memory=4 << 20, segment=64 << 10)
    with asker(address(node, "unix")) as ask, ask.room.sequence(FORM) as sequence:
        sequence.append(ids(96), CONTEXT[..., :96, :])
        again = Again(ask)
        span = ask.span_of(FORM, sequence.id)
        if by_keys:
            keys = [place.key for place in sequence.blocks() if place.key]
            span = ask.span_of_keys(FORM, keys=keys, first_tokens=range(0, 96, 16)).span

        @settings(max_examples=150, deadline=None)
        @given(asked())
        def compare(drawn: tuple[Any, ...]) -> None:
            ranges, options, first, later = drawn
            goes_on = bool(ranges) and ranges[-1][1] == first

            def call(visible: int) -> Call:
                mine = ranges
                if goes_on:
                    mine = [*ranges[:-1], (ranges[-1][0], visible)] if visible else []
                query = replace(over(span, visible).queries[0], ranges=mine)
                return Call(FORM, [query], layer=1, **options)

            number = again.prepare(call(first))
            assert number
            for visible in later:
                if goes_on and visible <= ranges[-1][0]:
                    continue
                done, told = again(number, call(visible)), ask.attend(call(visible))
                if visible > 96 and (goes_on or not by_keys):
                    assert done == GONE
                    continue
                assert isinstance(done, Computed)
                assert done.tokens == sum(told.tokens)
                expected = np.frombuffer(told.outputs + told.lse, np.float32)
                np.testing.assert_allclose(done.numbers, expected, rtol=0, atol=2e-6)

        with contextlib.closing(again.connection):
            compare()
