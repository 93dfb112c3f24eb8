"""Attend over a real node: what it answers is the oracle's, or says what is missing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from tests.unit.client.conftest import Start, address
from tests.unit.nodes.attention.asking import Asker, Call, Query, asker, check, ids, kv, rows

from kvfabric.types import Format, Key, Status

FORM = Format("float32", block_tokens=16, layers=3, kv_heads=2, head_dim=8)


@pytest.fixture
def ask(home: str) -> Iterator[Asker]:
    with asker(home) as found:
        yield found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_sequence_is_attended_with_its_open_tail(ask: Asker, dtype: str) -> None:
    form = Format(dtype, block_tokens=16, layers=3, kv_heads=2, head_dim=8)
    context = kv(form, 40)
    with ask.room.sequence(form) as sequence:
        sequence.append(ids(40), context)
        span = ask.span_of(form, sequence.id)
        for layer in range(3):
            call = Call(form, [Query(span, rows(form, 2), 40, context)], layer)
            answer = ask.attend(call)
            check(answer, call)
            assert list(answer.tokens) == [40]
            assert answer.read_bytes == 40 * 2 * 2 * 8 * (4 if dtype == "float32" else 2)


def test_what_the_rows_do_not_see_is_neither_read_nor_missed(ask: Asker) -> None:
    context = kv(FORM, 70)
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(70), context)
        span = ask.span_of(FORM, sequence.id)
        query = Query(span, rows(FORM, 3), 70, context, positions=[60, 61, 62])
        call = Call(FORM, [query], window=20, sinks=4)
        answer = ask.attend(call)
        check(answer, call)
        assert list(answer.tokens) == [4 + 63 - 41]


def test_a_chunk_is_causal_and_token_sets_are_kept(ask: Asker) -> None:
    context = kv(FORM, 70)
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(70), context)
        span = ask.span_of(FORM, sequence.id)
        ranges = [(1, 3), (5, 40), (40, 41), (45, 70)]
        query = Query(span, rows(FORM, 6), 70, context, range(64, 70), ranges)
        answer = ask.attend(call := Call(FORM, [query], softcap=3.0, dtype="float32"))
        check(answer, call)
        assert list(answer.tokens) == [2 + 36 + 25]


def test_shards_are_attended_by_their_keys_and_what_is_missing_is_a_gap(ask: Asker) -> None:
    context = kv(FORM, 48)
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(48), context)
        keys = [place.key for place in sequence.blocks() if place.key]
        opened = ask.span_of_keys(
            FORM, keys=[keys[2], keys[0], b"x" * 32], first_tokens=[32, 0, 64]
        )
        assert list(opened.statuses) == [Status.OK, Status.OK, Status.MISS]
        whole = [(0, 16), (32, 48)]
        queries = [
            Query(opened.span, rows(FORM, 1, seed=1), 80, context, ranges=whole),
            Query(opened.span, rows(FORM, 2, seed=2), 100, context),
            Query(opened.span, rows(FORM, 1, seed=3), 40, context, ranges=[(10, 35)]),
        ]
        answer = ask.attend(call := Call(FORM, queries))
        gaps = [(gap.query, gap.first_token, gap.end_token) for gap in answer.gaps]
        assert gaps == [(1, 64, 80), (2, 16, 32)]
        assert list(answer.tokens) == [32, 32, 9]
        queries[1].ranges, queries[2].ranges = whole, [(10, 16), (32, 35)]
        answer.ClearField("gaps")
        check(answer, call)
        ask.span_of_keys(FORM, span=opened.span, keys=[keys[1]], first_tokens=[16])
        queries[2].ranges = [(10, 35)]
        check(ask.attend(call := Call(FORM, queries[2:])), call)


def test_a_question_asked_again_is_answered_as_it_is_now(ask: Asker) -> None:
    context = kv(FORM, 60)
    with ask.room.sequence(FORM) as sequence:
        span = ask.span_of(FORM, sequence.id)
        for end in (20, 21, 35, 60):  # the same block grows, is sealed, and others follow
            sequence.append(ids(60)[sequence.length : end], context[..., sequence.length : end, :])
            for layer, window in itertools.product(range(3), (0, 7, 9, 11, 30)):
                query = Query(span, rows(FORM, 1), 60, context[..., :end, :], positions=[end - 1])
                check(ask.attend(call := Call(FORM, [query], layer, window=window)), call)
            whole = Call(FORM, [Query(span, rows(FORM, 1), 60, context[..., :end, :])])
            answer = ask.attend(whole)
            gaps = [(gap.first_token, gap.end_token) for gap in answer.gaps]
            assert gaps == ([(end, 60)] if end < 60 else [])


def test_what_is_attended_is_evicted_last(start: Start) -> None:
    node = start(memory=1 << 20, segment=64 << 10)
    size = 3 * 2 * 2 * 16 * 8 * 4
    room = (1 << 20) // (64 << 10) * ((64 << 10) // size)
    keys = [Key(number.to_bytes(32, "big")) for number in range(room + 10)]
    blocks = [np.zeros(size, np.uint8) for _ in keys]
    with asker(address(node, "unix")) as ask:
        ask.room.put(keys[:20], blocks[:20])
        places = [16 * number for number in range(10)]
        span = ask.span_of_keys(FORM, keys=keys[:10], first_tokens=places).span
        zeros = np.zeros((3, 2, 2, 160, 8), np.float32)
        call = Call(FORM, [Query(span, rows(FORM, 1), 160, zeros)])
        for _ in range(2):  # the first looks where they lie
            check(ask.attend(call), call)
        for number in range(20, len(keys)):
            ask.room.put([keys[number]], [blocks[number]])
        assert not ask.attend(call).gaps
        assert ask.room.match(keys[10:20]).matched == 0
