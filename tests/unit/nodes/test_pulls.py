"""The queue of pulls: who goes first, how fast, how often again, and what became of each key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvfabric.errors import Retry
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.copying.pulls import (
    BATCH_BYTES,
    BATCH_KEYS,
    BATCH_S,
    BURST_S,
    MIB,
    MIN_BYTES_PER_S,
    Batch,
    Outcome,
    PullLimits,
    PullOrder,
    Pulls,
    Throttle,
)

from .conftest import key, namespace

REPAIR, MOVE, BALANCE = (
    control_pb2.PRIORITY_REPAIR,
    control_pb2.PRIORITY_MOVE,
    control_pb2.PRIORITY_BALANCE,
)
LIMITS = PullLimits(
    parallel=3,
    throttled=2,
    unthrottled=2,
    per_source=2,
    orders=8,
    keys=400,
    attempts=3,
    retry_s=1.0,
    retry_most_s=4.0,
)


def order(
    number: int,
    keys: Sequence[int] = (0,),
    *,
    priority: int = MOVE,
    space: NamespaceId | None = None,
    bytes_per_s: int = 0,
    source: str = "source",
) -> PullOrder:
    return PullOrder(
        number,
        space or namespace("a"),
        tuple(key(k) for k in keys),
        source,
        types_pb2.Endpoints(),
        bytes_per_s=bytes_per_s,
        priority=priority,
        origin="test",
    )


@pytest.fixture
def pulls() -> Iterator[Pulls]:
    pulls = Pulls(LIMITS)
    yield pulls
    pulls.check()


def copied(pulls: Pulls, batch: Batch, now_s: float = 0.0) -> None:
    pulls.ended(batch, dict.fromkeys(batch.keys, Outcome.COPIED), len(batch.keys), "", now_s)


def failed(pulls: Pulls, batch: Batch, now_s: float = 0.0) -> None:
    pulls.ended(batch, {}, 0, "nobody answers", now_s)


def test_the_most_urgent_orders_go_first_and_no_more_than_two_at_once(pulls: Pulls) -> None:
    for number, priority in enumerate((BALANCE, MOVE, REPAIR)):
        pulls.add(order(number, [number], priority=priority), 0.0)

    first, second = pulls.start(0.0)
    assert [first.order.id, second.order.id] == [2, 1]
    assert pulls.start(0.0) == []
    copied(pulls, first)
    assert [batch.order.id for batch in pulls.start(0.0)] == [0]


def test_one_source_never_takes_every_place() -> None:
    pulls = Pulls(PullLimits(parallel=4, unthrottled=3, per_source=2))
    for number in range(4):
        pulls.add(order(number, [number], priority=REPAIR, source="stopped"), 0.0)
    pulls.add(order(5, [5], priority=BALANCE, source="well"), 0.0)
    assert [batch.order.id for batch in pulls.start(0.0)] == [0, 1, 5]
    pulls.check()


def test_slow_ones_never_take_every_place(pulls: Pulls) -> None:
    for number in range(4):
        wanted = order(number, [number], priority=REPAIR, bytes_per_s=MIB, source=f"n{number}")
        pulls.add(wanted, 0.0)
    for number in range(4, 8):
        pulls.add(order(number, [number], priority=BALANCE), 0.0)
    assert [batch.order.id for batch in pulls.start(0.0)] == [0, 1, 4]


def test_orders_of_one_priority_take_turns(pulls: Pulls) -> None:
    for number in range(3):
        pulls.add(order(number, range(number * 100, number * 100 + 100)), 0.0)
    turns = []
    waiting = pulls.start(0.0)
    while waiting:
        batch = waiting.pop(0)
        turns.append(batch.order.id)
        copied(pulls, batch)
        waiting += pulls.start(0.0)
    assert sorted(turns[:3]) == sorted(turns[3:]) == [0, 1, 2]


def test_an_order_has_one_batch_at_a_time_of_so_many_keys(pulls: Pulls) -> None:
    pulls.add(order(1, range(BATCH_KEYS + 1)), 0.0)
    (batch,) = pulls.start(0.0)
    assert batch.keys == tuple(key(number) for number in range(BATCH_KEYS))
    copied(pulls, batch)
    (rest,) = pulls.start(0.0)
    assert rest.keys == (key(BATCH_KEYS),)
    copied(pulls, rest, 3.0)
    (result,) = pulls.results
    assert list(result.outcomes) == [key(number) for number in range(BATCH_KEYS + 1)]
    assert set(result.outcomes.values()) == {Outcome.COPIED}
    assert (result.size_bytes, result.seconds) == (BATCH_KEYS + 1, 3.0)


def test_keys_without_a_verdict_come_again_first(pulls: Pulls) -> None:
    pulls.add(order(1, range(70)), 0.0)
    (batch,) = pulls.start(0.0)
    pulls.ended(batch, {key(0): Outcome.COPIED}, 1, "", 0.0)  # the rest was too large for one
    (again,) = pulls.start(0.0)
    assert again.keys == tuple(key(number) for number in range(1, 65))
    copied(pulls, again)


def test_a_source_that_does_not_answer_is_tried_later_and_later_and_then_given_up(
    pulls: Pulls,
) -> None:
    pulls.add(order(1, range(3)), 0.0)
    now_s = 0.0
    for wait_s in (1.0, 2.0):
        (batch,) = pulls.start(now_s)
        failed(pulls, batch, now_s)
        assert pulls.due_s(now_s) == now_s + wait_s
        assert pulls.start(now_s + wait_s - 0.1) == []
        now_s += wait_s
    (batch,) = pulls.start(now_s)
    failed(pulls, batch, now_s)
    (result,) = pulls.results
    assert set(result.outcomes.values()) == {Outcome.FAILED}
    assert result.why == "nobody answers"
    assert pulls.due_s(now_s) is None


def test_who_has_no_place_waits_for_the_end_of_another_and_looks_no_sooner(pulls: Pulls) -> None:
    for number in range(3):
        pulls.add(order(number, [number]), 0.0)
    first, second = pulls.start(0.0)
    failed(pulls, first)
    assert pulls.due_s(0.5) == 1.0
    (third,) = pulls.start(0.5)
    assert pulls.due_s(1.5) is None  # the first one's time has come, and both places are taken
    copied(pulls, second, 1.5)
    assert [batch.order.id for batch in pulls.start(1.5)] == [first.order.id]
    copied(pulls, third, 1.5)


def test_progress_gives_new_patience(pulls: Pulls) -> None:
    pulls.add(order(1, range(10)), 0.0)
    now_s = 0.0
    for number in range(9):
        (batch,) = pulls.start(now_s)
        failed(pulls, batch, now_s)
        now_s = pulls.due_s(now_s) or now_s
        (batch,) = pulls.start(now_s)
        pulls.ended(batch, {key(number): Outcome.COPIED}, 1, "cut off", now_s)
        now_s = pulls.due_s(now_s) or now_s
    assert not pulls.results


def test_a_key_is_never_under_way_twice(pulls: Pulls) -> None:
    pulls.add(order(1, [0, 1]), 0.0)
    pulls.add(order(2, [1, 2]), 0.0)
    pulls.add(order(3, [1]), 0.0)
    first, second = pulls.start(0.0)
    assert (first.keys, second.keys) == ((key(0), key(1)), (key(2),))
    copied(pulls, second)
    assert pulls.start(0.0) == []  # both wait for key 1
    copied(pulls, first)
    (third,) = pulls.start(0.0)
    assert third.keys == (key(1),)
    copied(pulls, third)
    assert [batch.keys for batch in pulls.start(0.0)] == [(key(1),)]


def test_other_namespaces_keys_are_other_keys(pulls: Pulls) -> None:
    pulls.add(order(1, [0]), 0.0)
    pulls.add(order(2, [0], space=namespace("b")), 0.0)
    assert len(pulls.start(0.0)) == 2


def test_an_order_that_is_at_work_counts_once(pulls: Pulls) -> None:
    assert pulls.add(order(1), 0.0)
    assert not pulls.add(order(1), 0.0)
    (batch,) = pulls.start(0.0)
    copied(pulls, batch)
    assert len(pulls.results) == 1
    assert pulls.add(order(1), 0.0)


def test_an_order_of_nothing_is_done(pulls: Pulls) -> None:
    pulls.add(order(1, []), 0.0)
    assert pulls.results[0].outcomes == {}
    assert len(pulls) == 0


def test_a_key_named_twice_counts_once(pulls: Pulls) -> None:
    pulls.add(order(1, [3, 3, 4]), 0.0)
    (batch,) = pulls.start(0.0)
    assert batch.keys == (key(3), key(4))
    copied(pulls, batch)
    assert list(pulls.results[0].outcomes) == [key(3), key(4)]


def test_what_is_cancelled_ends_with_what_has_come(pulls: Pulls) -> None:
    pulls.add(order(1, range(70)), 0.0)
    (batch,) = pulls.start(0.0)
    assert pulls.cancel("test", 1, 0.0)
    assert batch.cancelled
    assert not pulls.results  # the transfer still fills its extents
    pulls.ended(batch, {key(0): Outcome.COPIED}, 1, "the pull was cancelled", 0.0)
    (result,) = pulls.results
    assert list(result.outcomes.values()) == [Outcome.COPIED] + [Outcome.CANCELLED] * 69
    assert not pulls.cancel("test", 1, 0.0)


def test_the_queue_is_bounded(pulls: Pulls) -> None:
    for number in range(8):
        pulls.add(order(number, [number]), 0.0)
    with pytest.raises(Retry, match="8 pulls"):
        pulls.add(order(9), 0.0)


def test_the_keys_of_all_orders_are_bounded(pulls: Pulls) -> None:
    pulls.add(order(1, range(399)), 0.0)
    with pytest.raises(Retry, match="399 keys"):
        pulls.add(order(2, range(2)), 0.0)
    pulls.add(order(3, [500]), 0.0)


def test_a_throttle_moves_no_more_than_its_rate_says() -> None:
    """Bytes counted with a clock that is moved by what the throttle says."""
    rate = 10 * MIB
    throttle = Throttle(rate)
    now_s = moved = 0.0
    while now_s < 10.0:
        now_s += throttle.take(MIB, now_s)
        moved += MIB
        assert moved <= rate * (now_s + BURST_S) + MIB + 1  # a byte of rounding
    assert moved >= rate * 9.8


def test_a_throttle_forgives_a_pause_only_in_part() -> None:
    throttle = Throttle(10 * MIB)
    assert throttle.take(MIB, 0.0) == 0.0
    assert throttle.take(MIB, 100.0) == 0.0
    waits = [throttle.take(MIB, 100.0) for _ in range(3)]
    assert waits == pytest.approx([0.1 - BURST_S, 0.2 - BURST_S, 0.3 - BURST_S])


def test_an_unthrottled_order_never_waits() -> None:
    throttle = Throttle(0)
    assert [throttle.take(BATCH_BYTES, 0.0) for _ in range(3)] == [0.0] * 3
    assert throttle.batch_bytes == BATCH_BYTES


def test_a_throttled_batch_takes_no_longer_than_a_few_seconds() -> None:
    assert Throttle(2 * MIB).batch_bytes == 2 * MIB * BATCH_S
    assert Throttle(1).batch_bytes == MIN_BYTES_PER_S * BATCH_S
    assert Throttle(1 << 40).batch_bytes == BATCH_BYTES


class Histories(RuleBasedStateMachine):
    """Random orders, ends and failures: every key of every order gets one outcome, at last."""

    @initialize()
    def begin(self) -> None:
        self.pulls = Pulls(LIMITS)
        self.now_s = 0.0
        self.flying: list[Batch] = []
        self.given: dict[int, set[Key]] = {}
        self.next_id = 0

    @rule(
        first=st.integers(0, 90),
        count=st.integers(0, 90),
        priority=st.sampled_from([REPAIR, MOVE, BALANCE]),
        bytes_per_s=st.sampled_from([0, MIB]),
        source=st.sampled_from(["one", "another"]),
    )
    def add(self, first: int, count: int, priority: int, bytes_per_s: int, source: str) -> None:
        keys = range(first, first + count)
        wanted = order(
            self.next_id, keys, priority=priority, bytes_per_s=bytes_per_s, source=source
        )
        try:
            self.pulls.add(wanted, self.now_s)
        except Retry:
            return
        self.given[self.next_id] = set(wanted.keys)
        self.next_id += 1

    @rule(wait_s=st.floats(0.0, 5.0))
    def start(self, wait_s: float) -> None:
        self.now_s += wait_s
        self.flying += self.pulls.start(self.now_s)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if not self.flying:
            return
        batch = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        done = batch.keys[: data.draw(st.integers(0, len(batch.keys)))]
        why = "cut off" if not done or data.draw(st.booleans()) else ""
        outcome = data.draw(st.sampled_from([Outcome.COPIED, Outcome.MISSING, Outcome.FULL]))
        self.pulls.ended(batch, dict.fromkeys(done, outcome), len(done), why, self.now_s)

    @rule(number=st.integers(0, 20))
    def cancel(self, number: int) -> None:
        self.pulls.cancel("test", number, self.now_s)

    @invariant()
    def every_key_has_its_place(self) -> None:
        if not hasattr(self, "pulls"):
            return
        self.pulls.check()
        for result in self.pulls.results:
            assert set(result.outcomes) == self.given.pop(result.order.id)
        self.pulls.results.clear()
        assert len(self.given) == len(self.pulls)

    def teardown(self) -> None:
        if not hasattr(self, "pulls"):
            return
        for batch in self.flying:
            copied(self.pulls, batch, self.now_s)
        while self.pulls:
            self.now_s += LIMITS.retry_most_s
            for batch in self.pulls.start(self.now_s):
                copied(self.pulls, batch, self.now_s)
        self.every_key_has_its_place()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
