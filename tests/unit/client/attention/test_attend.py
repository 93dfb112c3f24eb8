"""Attention over a sequence at one node equals attention in one piece: dtypes, masks, cuts."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tests.unit.client.conftest import client, counter, room
from tests.unit.client.test_deadlines import eventually

import kvfabric_client
from kvfabric.attention.merge import Partial
from kvfabric.errors import Refused
from kvfabric.types import Format, Namespace
from kvfabric_client import Client, Missing, Pages, Query, Room, attend_batch
from kvfabric_client.attention.parts import Part

from .numbers import check, expected, fill, random_kv, random_queries

__all__ = ["client", "room"]  # fixtures: of one node

FORM = Format("float32", block_tokens=16, layers=2, kv_heads=2, head_dim=32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("asked", ["float32", "same"])
def test_every_dtype(room: Room, dtype: str, asked: str) -> None:
    form = Format(dtype, block_tokens=16, layers=2, kv_heads=2, head_dim=32)
    with room.sequence(form) as sequence:
        kv = random_kv(sequence.shape, 77)
        fill(sequence, kv)
        of = dtype if asked == "same" else asked
        queries = random_queries(3, 8, 32, of)
        for layer in range(2):
            got = sequence.attend(queries, layer=layer)
            check(got, expected(sequence.shape, kv, layer, queries, dtype=of), dtype)
            assert got.tokens == {sequence.node: 77}
            assert (got.approximate, got.share) == (False, 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"positions": [60, 61, 62]},
        {"positions": [5, 30, 76], "window": 20},
        {"positions": [40, 41, 42], "window": 10, "sinks": 3},
        {"visible": 33},
        {"softcap": 3.0, "scale": 0.5},
        {"visible": 70, "positions": [69, 68, 10]},
    ],
    ids=str,
)
def test_masks_and_options(room: Room, options: dict[str, Any]) -> None:
    with room.sequence(FORM) as sequence:
        kv = random_kv(sequence.shape, 77)
        fill(sequence, kv)
        queries = random_queries(3, 4, 32)
        got = sequence.attend(queries, layer=1, **options)
        check(got, expected(sequence.shape, kv, 1, queries, **options))


def test_token_sets(room: Room) -> None:
    with room.sequence(FORM) as sequence:
        kv = random_kv(sequence.shape, 77)
        fill(sequence, kv)
        queries = random_queries(2, 4, 32)
        only = [range(70, 90), range(3, 5), range(4, 20)]
        got = sequence.attend(queries, layer=0, tokens=only)
        want = expected(sequence.shape, kv, 0, queries, only=[range(3, 20), range(70, 77)])
        check(got, want)
        assert got.tokens == {sequence.node: 24}


def test_a_prompt_in_chunks_layer_by_layer_and_then_tokens_one_by_one(room: Room) -> None:
    """Blocks are sealed between the last layer of one token and the first of the next."""
    with room.sequence(FORM) as sequence:
        kv, at = random_kv(sequence.shape, 100), 0
        for size in (40, 23, *([1] * 37)):
            rows = random_queries(size, 8, 32, seed=at)
            for layer in range(2):
                k, v = kv[layer, ..., at : at + size, :]
                got = sequence.attend(rows, layer=layer, new=(range(at, at + size), k, v))
                where = range(at, at + size)
                check(
                    got,
                    expected(sequence.shape, kv[..., : at + size, :], layer, rows, positions=where),
                )
                assert sum(got.tokens.values()) == at
            at += size
            assert sequence.length == at
        assert np.array_equal(sequence.read(), kv)


def test_new_tokens_under_a_window_with_sinks(room: Room) -> None:
    with room.sequence(FORM) as sequence:
        kv = random_kv(sequence.shape, 60)
        fill(sequence, kv[..., :50, :])
        rows, where = random_queries(10, 4, 32), range(50, 60)
        got = sequence.attend(
            rows,
            layer=0,
            positions=where,
            new=(where, kv[0, 0, :, 50:], kv[0, 1, :, 50:]),
            window=7,
            sinks=2,
        )
        check(got, expected(sequence.shape, kv, 0, rows, positions=where, window=7, sinks=2))
        assert sum(got.tokens.values()) == 2 + 6  # what no row sees is not asked for


def test_latents(room: Room) -> None:
    form = Format("float32", block_tokens=16, layers=2, kv_heads=1, head_dim=48, kind="mla")
    with room.sequence(form) as sequence:
        latents = random_kv(sequence.shape, 50)
        assert latents.shape == (2, 1, 1, 50, 48)
        fill(sequence, latents[..., :49, :])
        queries = random_queries(1, 6, 48)
        given: dict[str, Any] = {"scale": 0.1, "value_dim": 32}
        got = sequence.attend(queries, layer=0, new=([49], latents[0, 0, :, 49:], None), **given)
        check(got, expected(sequence.shape, latents, 0, queries, **given))
        assert got.o.shape == (1, 6, 32)
        sequence.append([49], (latents[1, 0, :, 49:],), layer=1)
        assert np.array_equal(sequence.read(), latents)


def test_forks_cuts_and_attempts_are_attended_as_they_are(room: Room) -> None:
    with room.sequence(FORM) as sequence:
        kv, other = random_kv(sequence.shape, 77), random_kv(sequence.shape, 90, seed=1)
        fill(sequence, kv)
        queries = random_queries(1, 4, 32)
        sequence.attend(queries, layer=0)
        with sequence.fork(40) as fork:
            fork.append(range(500, 550), other[..., 40:, :])
            mixed = np.concatenate([kv[..., :40, :], other[..., 40:, :]], axis=-2)
            check(fork.attend(queries, layer=0), expected(fork.shape, mixed, 0, queries))
            check(sequence.attend(queries, layer=0), expected(sequence.shape, kv, 0, queries))
        sequence.truncate(20)
        sequence.append(range(500, 570), other[..., 20:, :])
        mixed = np.concatenate([kv[..., :20, :], other[..., 20:, :]], axis=-2)
        check(sequence.attend(queries, layer=1), expected(sequence.shape, mixed, 1, queries))
        attempt = sequence.fork(tentative=True)
        attempt.append(range(3), kv[..., :3, :])
        mixed = np.concatenate([mixed, kv[..., :3, :]], axis=-2)
        check(attempt.attend(queries, layer=1), expected(sequence.shape, mixed, 1, queries))
        sequence.accept(attempt, 92)
        want = expected(sequence.shape, mixed[..., :92, :], 1, queries)
        check(sequence.attend(queries, layer=1), want)


def test_blocks_that_were_sealed_short(room: Room) -> None:
    with room.sequence(FORM) as sequence:
        kv = random_kv(sequence.shape, 100)
        queries = random_queries(1, 4, 32)
        for end in (37, 59, 100):
            fill(sequence, kv[..., :end, :])
            want = expected(sequence.shape, kv[..., :end, :], 1, queries)
            check(sequence.attend(queries, layer=1), want)
            sequence.seal()
            check(sequence.attend(queries, layer=1), want)
        every = sequence.attend(queries, layer=0, pages=Pages(100, 8))  # whole ones, and the rest
        check(every, expected(sequence.shape, kv, 0, queries))


def test_attempts_that_end_leave_no_spans_behind(room: Room, client: Client) -> None:
    with room.sequence(FORM) as sequence:
        fill(sequence, random_kv(sequence.shape, 20))
        queries = random_queries(1, 4, 32)
        for _ in range(5):
            attempts = [sequence.fork(tentative=True) for _ in range(3)]
            for attempt in attempts:
                attempt.attend(queries, layer=0)
            sequence.accept(attempts[0])
        sequence.attend(queries, layer=0)
        sequence.accept(None)
        assert eventually(lambda: counter(client, "kvfabric_node_spans") == 1)
    assert eventually(lambda: counter(client, "kvfabric_node_spans") == 0)


def test_what_the_engine_keeps_itself_is_merged(room: Room) -> None:
    with room.sequence(FORM) as sequence:
        kv = random_kv(sequence.shape, 77)
        fill(sequence, kv[..., :60, :])
        queries = random_queries(2, 4, 32)
        mine = expected(sequence.shape, kv, 0, queries, only=[range(60, 77)])
        want = expected(sequence.shape, kv, 0, queries)
        check(sequence.attend(queries, layer=0, local=mine), want)
        check(sequence.attend(queries, layer=0, local=lambda: mine), want)
        nothing = Partial(np.zeros_like(mine.o), np.full_like(mine.lse, -np.inf))
        with pytest.raises(Refused, match="sees no key"):
            sequence.attend(queries, layer=0, visible=0, local=nothing)


def test_many_rows_go_in_several_messages(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Part, "max_rows", lambda part, row_bytes: 7)
    with room.sequence(FORM) as sequence:
        kv = random_kv(sequence.shape, 77)
        fill(sequence, kv)
        queries, where = random_queries(40, 4, 32), range(37, 77)
        got = sequence.attend(queries, layer=1, positions=where, window=9)
        check(got, expected(sequence.shape, kv, 1, queries, positions=where, window=9))
        assert sum(got.tokens.values()) == 48  # that some row sees, each counted once
        assert got.traffic.rounds == 1


def test_messages_stay_within_what_a_node_takes(room: Room) -> None:
    form = Format("float32", block_tokens=16, layers=1, kv_heads=8, head_dim=128)
    with room.sequence(form) as sequence:
        kv = random_kv(sequence.shape, 20)
        fill(sequence, kv)
        queries = random_queries(200, 32, 128)  # 3.1 MiB, and as much that comes back
        check(sequence.attend(queries, layer=0), expected(sequence.shape, kv, 0, queries))


def test_a_batch_of_requests_in_one_call(room: Room) -> None:
    with contextlib.ExitStack() as stack:
        sequences = [stack.enter_context(room.sequence(FORM)) for _ in range(5)]
        kvs = [random_kv(s.shape, 30 + 11 * i, seed=i) for i, s in enumerate(sequences)]
        for i, (sequence, kv) in enumerate(zip(sequences, kvs, strict=True)):
            fill(sequence, kv, first_id=1000 * i)
        queries = [random_queries(1 + i % 3, 8, 32, seed=i) for i in range(5)]
        asked = [Query(s, q) for s, q in zip(sequences, queries, strict=True)]
        answers = attend_batch([*asked, Query(sequences[0], queries[1], visible=9)], layer=1)
        for i, answer in enumerate(answers[:5]):
            check(answer, expected(sequences[i].shape, kvs[i], 1, queries[i]))
        check(answers[5], expected(sequences[0].shape, kvs[0], 1, queries[1], visible=9))
        assert attend_batch([], layer=0) == []
        one = Query(sequences[0], queries[0], new=([1], kvs[0][0, 0, :, :1], kvs[0][0, 1, :, :1]))
        with pytest.raises(Refused, match="in two queries"):
            attend_batch([one, one], layer=0)


def test_several_threads_on_one_sequence(room: Room) -> None:
    with room.sequence(FORM) as sequence, ThreadPoolExecutor(4) as threads:
        kv = random_kv(sequence.shape, 77)
        fill(sequence, kv)
        rows = [random_queries(2, 4, 32, seed=seed) for seed in range(24)]
        answers = threads.map(lambda q: sequence.attend(q, layer=0), rows)
        for queries, got in zip(rows, answers, strict=True):
            check(got, expected(sequence.shape, kv, 0, queries))


def test_many_threads_with_new_tokens_wait_for_each_other_never_for_ever(room: Room) -> None:
    """Each holds a connection while it appends over another one."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(12) as threads:
        sequences = [stack.enter_context(room.sequence(FORM)) for _ in range(12)]
        kv = random_kv(sequences[0].shape, 40)

        def decode(index: int) -> None:
            sequence, queries = sequences[index], random_queries(1, 4, 32, seed=index)
            for at in range(40):
                for layer in range(2):
                    k, v = kv[layer, ..., at : at + 1, :]
                    got = sequence.attend(queries, layer=layer, new=([1000 * index + at], k, v))
            check(got, expected(sequence.shape, kv, 1, queries))

        list(threads.map(decode, range(12)))


def test_coroutines(home: str) -> None:
    async def attend() -> None:
        async with await kvfabric_client.connect_async(home) as client:
            room = client.open(Namespace("default", b"f" * 32))
            one = await room.sequence(FORM)
            kv = random_kv(one.sync.shape, 30)
            await one.append(range(30), kv)
            queries = random_queries(1, 4, 32)
            got = await one.attend(queries, layer=0)
            check(got, expected(one.sync.shape, kv, 0, queries))
            await one.close()

    asyncio.run(attend())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"queries": np.zeros((2, 3, 32), np.float32)}, "3 query heads over 2 KV heads"),
        ({"queries": np.zeros((2, 4, 31), np.float32)}, r"give \[rows, query heads, 32\]"),
        ({"queries": np.zeros((4, 32), np.float32)}, r"give \[rows, query heads, 32\]"),
        ({"queries": np.zeros((2, 4, 32), np.float16)}, "queries of float16 over KV of float32"),
        ({"layer": 2}, "layer 2 of 2"),
        ({"positions": [1]}, "for 2 rows"),
        ({"positions": [-1, 3]}, "for 2 rows"),
        ({"visible": -1}, "visible -1"),
        ({"tokens": [range(0, 8, 2)]}, "give ranges"),
        ({"new": ([1], np.zeros((2, 1, 32), "f4"), np.zeros((2, 1, 32), "f4"))}, "2 rows with 1"),
        (
            {"new": ([1, 2], np.zeros((3, 2, 32), "f4"), np.zeros((3, 2, 32), "f4"))},
            "new KV of",
        ),
        ({"value_dim": 8}, "only in MLA latents"),
        ({"window": -1}, "none may be negative"),
    ],
    ids=lambda given: str(given)[:20],
)
def test_what_cannot_be_asked_is_refused_by_name(
    room: Room, options: dict[str, Any], says: str
) -> None:
    with room.sequence(FORM) as sequence:
        fill(sequence, random_kv(sequence.shape, 20))
        given: dict[str, Any] = {"queries": np.zeros((2, 4, 32), np.float32), "layer": 0}
        given |= options
        with pytest.raises(Refused, match=says):
            sequence.attend(given.pop("queries"), **given)
        assert sequence.length == 20


def test_packings_of_ones_own_are_refused_by_name(room: Room) -> None:
    form = Format("bfloat16", 16, "vllm-cpu-amx", 2, 2, 32)
    queries = np.zeros((1, 2, 32), np.float32)
    with (
        room.sequence(form, size_bytes=8192) as sequence,
        pytest.raises(Refused, match="vllm-cpu-amx"),
    ):
        sequence.attend(queries, layer=0)


def test_tokens_that_are_not_there_are_missing(room: Room) -> None:
    with room.sequence(FORM) as sequence:
        fill(sequence, random_kv(sequence.shape, 20))
        with pytest.raises(Missing) as missing:
            sequence.attend(random_queries(1, 4, 32), layer=0, visible=24)
        assert missing.value.ranges == [range(20, 24)]


def test_token_sets_of_more_ranges_than_a_message_holds(room: Room) -> None:
    """Every other one of very many tokens."""
    form = Format("float16", block_tokens=1024, layers=1, kv_heads=1, head_dim=1)
    with room.sequence(form) as sequence:
        kv = random_kv(sequence.shape, 440_000)
        fill(sequence, kv)
        only = [range(t, t + 1) for t in range(0, 440_000, 2)]
        queries = random_queries(2, 2, 1)
        got = sequence.attend(queries, layer=0, tokens=only, timeout_s=60)
        kept = kv[..., ::2, :]
        check(got, expected(sequence.shape, kept, 0, queries))
        assert got.tokens == {sequence.node: 220_000}


def test_queries_with_more_ranges_than_a_message_holds(room: Room) -> None:
    with room.sequence(FORM) as sequence:
        kv = random_kv(sequence.shape, 7000)
        fill(sequence, kv)
        only = [range(t, t + 1) for t in range(0, 7000, 2)]
        queries = random_queries(80, 4, 32)
        asked = [Query(sequence, queries[i : i + 1], tokens=only) for i in range(80)]
        whole = expected(sequence.shape, kv[..., ::2, :], 0, queries)
        for i, answer in enumerate(attend_batch(asked, layer=0, timeout_s=60)):
            check(answer, Partial(whole.o[i : i + 1], whole.lse[i : i + 1]))


def test_sequences_that_nobody_closed_leave_one_span_behind(room: Room, client: Client) -> None:
    queries = random_queries(1, 4, 32)
    for _ in range(5):
        sequence = room.sequence(FORM)
        fill(sequence, random_kv(sequence.shape, 20))
        sequence.attend(queries, layer=0)
    assert eventually(lambda: counter(client, "kvfabric_node_spans") <= 2)  # the last one's, too
