"""Prepared queries are right, or gone, whatever becomes of what they read."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.client.conftest import Start, address, core_of
from tests.unit.client.test_deadlines import eventually
from tests.unit.nodes.attention.asking import Array, Asker, Call, Query, asker, ids, kv, rows
from tests.unit.nodes.attention.prepared.again import CONTEXT, FORM, TIMEOUT_S, Again, over, soon

from kvfabric.types import Format
from kvfabric_client.prepared import GONE, Computed
from kvfabric_nodes.attention import prepared
from kvfabric_nodes.node import Node
from kvfabric_nodes.sequences.room import SequenceRoom
from kvfabric_nodes.sequences.sequence import Shape
from kvfabric_nodes.store.extents import Extent

CHANGES: dict[str, Callable[[Asker, object], object]] = {
    "truncate": lambda ask, sequence: sequence.truncate(39),  # type: ignore[attr-defined]
    "close": lambda ask, sequence: sequence.close(),  # type: ignore[attr-defined]
    "drop": lambda ask, sequence: sequence.close(drop=True),  # type: ignore[attr-defined]
    "short seal": lambda ask, sequence: sequence.seal(),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("how", list(CHANGES))
def test_what_is_cut_or_freed_is_gone(ask: Asker, again: Again, node: Node, how: str) -> None:
    sequence = ask.room.sequence(FORM)
    sequence.append(ids(40), CONTEXT[..., :40, :])
    span = ask.span_of(FORM, sequence.id)
    number = again.prepare(over(span, 40))
    again.check(number, over(span, 40))
    CHANGES[how](ask, sequence)
    assert again(number, over(span, 30)) == GONE
    sequence.close(drop=True)
    assert eventually(lambda: not core_of(node).books().quarantined_bytes)


def test_it_is_gone_before_an_open_block_is_written_over(
    ask: Asker, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(40), CONTEXT[..., :40, :])
        call = over(ask.span_of(FORM, sequence.id), 40)
        number = again.prepare(call)
        copy, meanwhile = SequenceRoom.copy, []

        def copy_and_ask(room: SequenceRoom, source: Extent, target: Extent, shape: Shape) -> None:
            copy(room, source, target, shape)
            meanwhile.append(again(number, call))

        monkeypatch.setattr(SequenceRoom, "copy", copy_and_ask)
        sequence.truncate(20)  # within a sealed block
        assert meanwhile == [GONE]


def test_purged_shards_are_gone(ask: Asker, again: Again, node: Node) -> None:
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(64), CONTEXT[..., :64, :])
        keys = [place.key for place in sequence.blocks() if place.key]
        span = ask.span_of_keys(FORM, keys=keys, first_tokens=[0, 16, 32, 48]).span
        number = again.prepare(over(span, 64))
        ask.room.purge()
        assert again(number, over(span, 64)) == GONE
        assert not core_of(node).books().quarantined_bytes, "nobody computes it"
        node.check()


def test_what_goes_while_its_first_attend_is_computed_is_not_prepared(
    ask: Asker, again: Again, node: Node
) -> None:
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(64), CONTEXT[..., :64, :])
        keys = [place.key for place in sequence.blocks() if place.key]
        span = ask.span_of_keys(FORM, keys=keys, first_tokens=[0, 16, 32, 48]).span
    preparations = node.attention.preparations
    assert preparations is not None
    with ThreadPoolExecutor(1) as thread:
        with preparations.turn():
            number = thread.submit(again.prepare, over(span, 64))
            assert eventually(lambda: bool(core_of(node)._readings))
            ask.room.purge()
        assert not number.result(TIMEOUT_S)


def test_bytes_that_are_freed_are_not_used_again_while_it_is_computed(start: Start) -> None:
    form = Format("float32", block_tokens=64, layers=1, kv_heads=8, head_dim=128)
    node = start(memory=48 << 20, segment=2 << 20)
    context, vectors, held = kv(form, 2048), rows(form, 64), []
    with asker(address(node, "unix")) as ask:
        ask.client.stats()
        again = Again(ask)
        for _ in range(20):
            sequence = ask.room.sequence(form)
            sequence.append(ids(2048), context)
            span = ask.span_of(form, sequence.id)
            call = Call(form, [Query(span, vectors, 2048, context)])
            number = again.prepare(call)
            again.connection.begin(number, 0, 2048, vectors.tobytes(), 64 * 16 * 129, soon())
            sequence.close(drop=True)
            held.append(core_of(node).books().quarantined_bytes)
            node.check()
            with ask.room.sequence(form) as other:  # there is no room for both
                other.append(ids(2048, 1), np.full_like(context, np.nan))
            done = again.connection.finish(soon())
            if isinstance(done, Computed):
                assert np.isfinite(done.numbers).all()
            ask.room.purge()
        again.connection.close()
        assert any(held)
        assert eventually(lambda: not core_of(node).books().quarantined_bytes)


def test_what_is_being_written_behind_what_it_sees_reaches_no_number(
    ask: Asker, again: Again, node: Node
) -> None:
    form = Format("float32", block_tokens=120, layers=1, kv_heads=1, head_dim=64)
    context, over_s = kv(form, 40), time.monotonic() + 1
    with ask.room.sequence(form) as sequence:
        sequence.append(ids(40), context)
        query = [Query(ask.span_of(form, sequence.id), rows(form, 1), 40, context)]
        call = Call(form, query, value_dim=64)
        number = again.prepare(call)
        (tail,) = node.sequences.all[sequence.id].tails
        view = node.sequence_calls.room.view(tail.extent, node.sequences.all[sequence.id].shape)
        behind = np.frombuffer(view, np.float32).reshape(2, 120, 64)[
            :, 40:
        ]  # of keys and of values
        with ThreadPoolExecutor(1) as thread:
            writer = thread.submit(_flicker, behind, over_s)
            while not writer.done():
                done = again(number, call)
                assert isinstance(done, Computed)
                assert np.isfinite(done.numbers).all()
        again.check(number, call)


def _flicker(place: Array, until_s: float) -> None:
    while time.monotonic() < until_s:
        place[:] = np.nan
        place[:] = 0


def test_it_lasts_a_while(ask: Asker, again: Again, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "LIFE_S", 0.05)
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(40), CONTEXT[..., :40, :])
        call = over(ask.span_of(FORM, sequence.id), 40)
        number = again.prepare(call)
        assert eventually(lambda: again(number, call) == GONE)
        other = again.prepare(call)
        assert other not in (0, number)


def test_another_sessions_and_made_up_numbers_are_gone(
    ask: Asker, again: Again, node: Node
) -> None:
    with ask.room.sequence(FORM) as sequence, asker(address(node, "tcp")) as stranger:
        sequence.append(ids(40), CONTEXT[..., :40, :])
        call = over(ask.span_of(FORM, sequence.id), 40)
        number = again.prepare(call)
        stranger.client.stats()
        theirs = Again(stranger)
        assert theirs(number, call) == GONE
        for made_up in (0, 1, -1, number + 4096, number - 4096, 1 << 62, -(1 << 63)):
            assert again(made_up, call) == GONE
        assert again(number, replace(call, layer=FORM.layers)) == GONE
        assert again(number, replace(call, layer=(1 << 32) - 1)) == GONE
        assert again(number, over(call.queries[0].span, 40, count=2)) == GONE  # twice the vectors
        again.check(number, call)
        theirs.connection.close()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 20)),
        st.tuples(st.just("truncate"), st.integers(0, 30)),
        st.tuples(st.just("seal"), st.just(0)),
        st.tuples(st.just("attend"), st.integers(0, 40)),
    ),
    min_size=5,
    max_size=30,
)


@pytest.mark.parametrize("transport", ["unix"])
def test_it_is_never_a_wrong_number(start: Start, transport: str) -> None:
    """Random decoding: prepared once and again, it is what an attend answers, or nothing."""
    node = start(memory=8 << 20, segment=64 << 10)
    seeds = itertools.count()  # the same tokens have the same KV, always

    @settings(max_examples=40, deadline=None)
    @given(STEPS)
    def decode(steps: Sequence[tuple[str, int]]) -> None:
        with asker(address(node, transport)) as ask, ask.room.sequence(FORM) as sequence:
            context, number = CONTEXT[..., :0, :], 0
            span = ask.span_of(FORM, sequence.id)
            again = Again(ask)
            for (what, size), seed in zip(steps, seeds, strict=False):
                length = context.shape[-2]
                if what == "append":
                    new = kv(FORM, size, seed=seed)
                    sequence.append(ids(size, seed), new)
                    context = np.concatenate([context, new], axis=-2)
                elif what == "truncate":
                    sequence.truncate(max(0, length - size))
                    context = context[..., : max(0, length - size), :]
                elif what == "seal":
                    sequence.seal()
                elif length:
                    visible = max(1, length - size)
                    query = Query(span, rows(FORM, 1, seed=seed), visible, context)
                    call = Call(FORM, [query], layer=seed % FORM.layers)
                    if again(number, call) == GONE:
                        number = again.prepare(call)
                    again.check(number, call)
            again.connection.close()

    decode()
