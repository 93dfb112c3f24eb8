"""Prepared queries at a real node: what they answer is what an attend does, or nothing."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.client.conftest import Start, address, core_of, counter
from tests.unit.client.test_deadlines import eventually
from tests.unit.nodes.attention.asking import Asker, Call, Query, asker, check, ids, kv, rows

from kvfabric.attention.floats import narrowed
from kvfabric.errors import DeadlineExceeded, Unreachable
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Format, Key
from kvfabric_client.link import Link
from kvfabric_client.prepared import BUSY, GONE, Computed, PreparedConnection
from kvfabric_nodes.attention import prepared
from kvfabric_nodes.attention.kernels import native
from kvfabric_nodes.node import Node

pytestmark = pytest.mark.skipif(not native.available(), reason="no native kernel here")

FORM = Format("float32", block_tokens=16, layers=3, kv_heads=2, head_dim=8)
CONTEXT = kv(FORM, 200)
TIMEOUT_S = 20.0


@pytest.fixture(autouse=True)
def _long_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gone is so for other reasons than a slow machine."""
    monkeypatch.setattr(prepared, "LIFE_S", 600.0)


class Again:
    """Asks at one node again what it has prepared."""

    def __init__(self, ask: Asker) -> None:
        self.ask = ask
        taken = self.link.take_prepared(soon())
        assert taken is not None
        self.connection = taken

    @property
    def link(self) -> Link:
        (link,) = self.ask.client._links.values()
        return link

    def prepare(self, call: Call) -> int:
        message = call.message()
        message.prepare = True
        answer: node_pb2.AttendResponse = self.ask.say("attend", message)
        return answer.prepared

    def begin(self, number: int, call: Call) -> None:
        (query,) = call.queries
        vectors = narrowed(query.vectors, call.query_dtype).tobytes()
        answers = query.vectors[..., 0].size * ((call.value_dim or FORM.head_dim) + 1)
        self.connection.begin(number, call.layer, query.visible, vectors, answers, soon())

    def __call__(self, number: int, call: Call) -> Computed | int:
        self.begin(number, call)
        return self.connection.finish(soon())

    def check(self, number: int, call: Call) -> Computed:
        """It is computed, and right."""
        done = self(number, call)
        assert isinstance(done, Computed), f"verdict {done}"
        lse = call.queries[0].vectors[..., 0].size
        answer = node_pb2.AttendResponse(
            outputs=done.numbers[:-lse].tobytes(), lse=done.numbers[-lse:].tobytes()
        )
        check(answer, call)
        return done


@pytest.fixture
def node(start: Start) -> Node:
    return start(memory=4 << 20, segment=64 << 10)


@pytest.fixture(params=["unix", "tcp"])
def ask(request: pytest.FixtureRequest, node: Node) -> Iterator[Asker]:
    with asker(address(node, request.param)) as found:
        yield found


@pytest.fixture
def again(ask: Asker) -> Iterator[Again]:
    ask.client.stats()  # its link is there
    made = Again(ask)
    yield made
    made.connection.close()


def soon() -> float:
    return time.monotonic() + TIMEOUT_S


def over(span: int, visible: int, count: int = 1, seed: int = 7) -> Call:
    return Call(FORM, [Query(span, rows(FORM, count, seed=seed), visible, CONTEXT)])


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


@pytest.mark.parametrize("size_bytes", [(512 << 10) + 1, (1 << 32) - 1])
def test_a_record_that_is_none_ends_its_connection(
    ask: Asker, again: Again, size_bytes: int
) -> None:
    connection = again.connection
    connection._sock.sendall(struct.pack("<qqII", 1, 1, 0, size_bytes))
    connection._expected.append(1)
    with pytest.raises(Unreachable):
        connection.finish(soon())
    assert not connection.usable
    assert ask.client.stats().node, "the session goes on"


def test_it_ends_with_its_session(node: Node) -> None:
    with asker(address(node, "tcp")) as ask:
        ask.client.stats()
        again = Again(ask)
        other = PreparedConnection(again.link._join(soon(), "attend"))
        with ask.room.sequence(FORM) as sequence:
            sequence.append(ids(40), CONTEXT[..., :40, :])
            assert again.prepare(over(ask.span_of(FORM, sequence.id), 40))
    other._expected.append(1)
    with pytest.raises(Unreachable):
        other.finish(soon())
    again.connection.close()
    assert node.attention.preparations is not None
    assert eventually(lambda: not node.attention.preparations._entries)  # type: ignore[union-attr]


def test_an_answer_that_does_not_come_in_time_ends_the_connection() -> None:
    ours, theirs = socket.socketpair()
    with contextlib.closing(theirs):
        connection = PreparedConnection(_Detached(ours))  # type: ignore[arg-type]
        connection.begin(1, 0, 0, b"", 1, soon())
        with pytest.raises(DeadlineExceeded):
            connection.finish(time.monotonic() + 0.02)
        assert not connection.usable


class _Detached:
    address = "unix:there"

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def detach(self) -> socket.socket:
        return self._sock


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
