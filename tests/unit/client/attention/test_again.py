"""What is asked again goes the short way: with the same numbers, or the ordinary way after all."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.client.conftest import Start, address, counter
from tests.unit.client.test_deadlines import eventually

import kvfabric_client
from kvfabric.types import Format, Namespace
from kvfabric_client import Client, Missing, Query, Sequence, attend_batch
from kvfabric_client.link import Link
from kvfabric_client.prepared import PreparedConnection
from kvfabric_nodes.attention import prepared
from kvfabric_nodes.attention.kernels import native
from kvfabric_nodes.node import Node
from kvfabric_nodes.serving import server

from .lending import QUERIES, TOKENS, Nodes, at, right
from .numbers import Array, check, expected, fill, random_kv, random_queries

pytestmark = pytest.mark.skipif(not native.available(), reason="no native kernel here")

SPACE = Namespace("default", b"f" * 32)
FORM = Format("float32", block_tokens=16, layers=2, kv_heads=2, head_dim=32)
HEADS = 4
RECORDS = 24 + 32  # bytes beside vectors and numbers
ATTENDS = "kvfabric_node_attends_prepared_total"
REFUSED = "kvfabric_node_attend_refusals_total"


@pytest.fixture(autouse=True)
def _long_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gone is so for other reasons than a slow machine."""
    monkeypatch.setattr(prepared, "LIFE_S", 600.0)


@pytest.fixture
def here(home: str) -> Iterator[Client]:
    with contextlib.closing(kvfabric_client.connect(home, timeout_s=20)) as client:
        yield client


@pytest.fixture
def sequence(here: Client) -> Iterator[Sequence]:
    with here.open(SPACE).sequence(FORM) as sequence:
        yield sequence


def short(client: Client) -> int:
    """How many attends went the short way."""
    return round(counter(client, ATTENDS))


def attend(sequence: Sequence, kv: Array, seed: int, layer: int = 0, **options: Any) -> int:
    """Attends, and checks it; answers the bytes beside vectors and numbers."""
    queries = random_queries(options.pop("rows", 1), HEADS, 32, seed=seed)
    got = sequence.attend(queries, layer=layer, **options)
    check(got, expected(sequence.shape, kv, layer, queries, **options))
    return got.traffic.header_bytes


def asked_thrice(sequence: Sequence) -> Array:
    """Has it attended until it goes the short way; the KV of its tokens."""
    kv = random_kv(sequence.shape, 40)
    fill(sequence, kv)
    for seed in range(3):
        attend(sequence, kv, seed)
    return kv


def test_from_the_third_time_on_it_goes_the_short_way(here: Client, sequence: Sequence) -> None:
    kv = random_kv(sequence.shape, 40)
    fill(sequence, kv)
    sizes = [attend(sequence, kv, seed, seed % 2) for seed in range(8)]
    assert sizes[2:] == [RECORDS] * 6
    assert min(sizes[:2]) > RECORDS
    assert short(here) == 6


def test_the_short_way_takes_no_other_connection(
    sequence: Sequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = asked_thrice(sequence)
    with monkeypatch.context() as patch:
        patch.delattr(Link, "take_lane")
        attend(sequence, kv, 3)
    attend(sequence, kv, 4, positions=[17])


@pytest.mark.parametrize(
    "options",
    [
        {"window": 20},
        {"window": 20, "sinks": 4},
        {"softcap": 3.0, "scale": 0.5},
        {"tokens": [range(3, 9), range(20, 99)]},
        {"rows": 3},
    ],
    ids=str,
)
def test_as_tokens_come_it_stays_prepared(
    here: Client, sequence: Sequence, options: dict[str, Any]
) -> None:
    kv, count = random_kv(sequence.shape, 48), 12
    fill(sequence, kv[..., : 48 - count, :])
    for end in range(48 - count, 48):
        visible, only = kv[..., :end, :], options.get("tokens")
        rest = {name: value for name, value in options.items() if name != "tokens"}
        queries = random_queries(rest.pop("rows", 1), HEADS, 32, seed=end)
        for layer in range(2):
            got = sequence.attend(queries, layer=layer, **{**rest, "tokens": only})
            want = expected(sequence.shape, visible, layer, queries, only=only, **rest)
            check(got, want)
        sequence.append([end], kv[..., end : end + 1, :])
    assert short(here) == 2 * count - 2


def test_new_tokens_are_attended_beside_it(here: Client, sequence: Sequence) -> None:
    kv = random_kv(sequence.shape, 80)
    fill(sequence, kv[..., :20, :])
    for at_ in range(20, 80):
        for layer in range(2):
            new = ([at_], *kv[layer, ..., at_ : at_ + 1, :])
            attend_one(sequence, kv[..., : at_ + 1, :], layer, new, positions=[at_])
    blocks = 60 // 16 + 1  # a block that is opened is not in what was prepared
    assert short(here) >= 2 * 60 - 2 - 2 * blocks


def attend_one(sequence: Sequence, kv: Array, layer: int, new: Any, **options: Any) -> None:
    queries = random_queries(1, HEADS, 32, seed=kv.shape[-2])
    got = sequence.attend(queries, layer=layer, new=new, **options)
    check(got, expected(sequence.shape, kv, layer, queries))
    assert sum(got.tokens.values()) == kv.shape[-2] - 1


def test_positions_and_batches_at_one_node_go_the_ordinary_way(
    here: Client, sequence: Sequence
) -> None:
    kv = random_kv(sequence.shape, 40)
    fill(sequence, kv)
    for _ in range(4):
        attend(sequence, kv, 1, positions=[17])
        queries = random_queries(1, HEADS, 32)
        for got in attend_batch([Query(sequence, queries)] * 2, layer=0):
            check(got, expected(sequence.shape, kv, 0, queries))
    assert short(here) == 0


def test_while_another_is_computed_it_waits_the_ordinary_way(
    here: Client, sequence: Sequence, node: Node
) -> None:
    kv = asked_thrice(sequence)
    preparations = node.attention.preparations
    assert preparations is not None
    asking = threading.Thread(target=attend, args=(sequence, kv, 7))
    with preparations.turn():
        asking.start()
        with contextlib.closing(kvfabric_client.connect(address(node, "tcp"))) as other:
            assert eventually(lambda: counter(other, REFUSED + '{reason="busy"}') == 1)
    asking.join()
    assert short(here) == 1
    assert attend(sequence, kv, 8) == RECORDS, "it is prepared still"


def test_an_answer_that_nobody_took_is_not_taken_for_another(
    here: Client, sequence: Sequence
) -> None:
    kv = asked_thrice(sequence)

    def fails() -> Any:
        raise KeyboardInterrupt

    for seed in range(3, 6):
        with pytest.raises(KeyboardInterrupt):
            sequence.attend(random_queries(1, HEADS, 32), layer=1, local=fails)
        attend(sequence, kv, seed)


def test_an_interrupted_wait_leaves_no_answer_behind(
    sequence: Sequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = asked_thrice(sequence)

    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PreparedConnection, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            attend(sequence, kv, 3)
    attend(sequence, kv, 4)


def test_a_connection_that_was_lost_costs_nothing(here: Client, sequence: Sequence) -> None:
    kv = asked_thrice(sequence)
    for connection in sequence.writer.home.link._attending:
        connection._sock.shutdown(2)
    attend(sequence, kv, 3)
    before = short(here)
    attend(sequence, kv, 4)
    attend(sequence, kv, 5)
    assert short(here) > before


def test_a_node_without_threads_for_it_is_asked_once(
    here: Client, sequence: Sequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_THREADS", 0)
    kv = random_kv(sequence.shape, 40)
    fill(sequence, kv)
    sizes = [attend(sequence, kv, seed) for seed in range(6)]
    assert short(here) == 0
    assert min(sizes) > RECORDS
    (span,) = sequence.context._spans.values()
    assert [alike.pays for alike in span._alike.values()] == [False]


def test_every_node_of_a_sequence_is_asked_so(lent: Sequence, kv: Array, nodes: Nodes) -> None:
    right(lent, kv)
    records = len(nodes) * RECORDS  # once its blocks have come to rest
    assert eventually(lambda: lent.attend(QUERIES, layer=0).traffic.header_bytes == records)
    for layer in range(4):
        right(lent, kv, layer % 2)


def test_a_node_that_dies_is_missed_as_ever(lent: Sequence, kv: Array, nodes: Nodes) -> None:
    for _ in range(3):
        right(lent, kv)
    theirs = at(lent, "east")

    def dies() -> Any:
        nodes["east"].stop()
        return None

    before = lent.attend(QUERIES, layer=0, local=dies)  # it may answer before it goes
    check(before, expected(lent.shape, kv[..., :TOKENS, :], 0, QUERIES))
    with pytest.raises(Missing) as missing:
        lent.attend(QUERIES, layer=1)
    assert missing.value.ranges == theirs


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 20)),
        st.tuples(st.just("truncate"), st.integers(0, 30)),
        st.tuples(st.just("seal"), st.just(0)),
        st.tuples(st.just("fork"), st.integers(0, 30)),
        st.tuples(st.just("attend"), st.integers(0, 40)),
        st.tuples(st.just("decode"), st.integers(1, 8)),
    ),
    min_size=5,
    max_size=20,
)


class Decoding:
    """A sequence, its numbers, and what happens to both."""

    def __init__(self, sequence: Sequence, seeds: Iterator[int]) -> None:
        """`seeds`: none comes twice, for the same ids must have the same KV, always."""
        self.sequence = sequence
        self.kv = random_kv(sequence.shape, 0)
        self.seeds = seeds

    def append(self, count: int) -> None:
        seed = next(self.seeds)
        new = random_kv(self.sequence.shape, count, seed)
        self.sequence.append(range(100 * seed, 100 * seed + count), new)
        self.kv = np.concatenate([self.kv, new], axis=-2)

    def truncate(self, count: int) -> None:
        self.kv = self.kv[..., : max(0, self.sequence.length - count), :]
        self.sequence.truncate(self.kv.shape[-2])

    def seal(self, _: int) -> None:
        self.sequence.seal()

    def fork(self, count: int) -> None:
        """It goes on, its parent ends."""
        fork = self.sequence.fork(max(0, self.sequence.length - count))
        self.sequence.close(drop=True)
        self.sequence, self.kv = fork, self.kv[..., : fork.length, :]

    def attend(self, less: int) -> None:
        seed, visible = next(self.seeds), self.sequence.length - less
        if visible > 0:
            options = [{}, {"window": 9, "sinks": 2}][seed % 3 == 0]
            attend(self.sequence, self.kv, seed, less % 2, visible=visible, **options)

    def decode(self, count: int) -> None:
        for _ in range(count):
            for layer in range(2):
                if self.sequence.length:
                    attend(self.sequence, self.kv, next(self.seeds), layer)
            self.append(1)


def test_random_decoding(start: Start) -> None:
    """Over random histories the numbers are right, whichever way they came."""
    node, seeds = start(), itertools.count()
    with contextlib.closing(kvfabric_client.connect(address(node, "unix"), timeout_s=20)) as here:

        @settings(max_examples=60, deadline=None)
        @given(STEPS)
        def decode(steps: list[tuple[str, int]]) -> None:
            decoding = Decoding(here.open(SPACE).sequence(FORM), seeds)
            try:
                for what, count in steps:
                    getattr(decoding, what)(count)
            finally:
                decoding.sequence.close(drop=True)

        decode()
        assert short(here) > 0
