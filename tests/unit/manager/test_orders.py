"""Commands wait for their node's next heartbeat."""

from __future__ import annotations

import pytest

from kvfabric.errors import Broken
from kvfabric.manager.orders import MAX_ANSWER_BYTES, MAX_PER_ANSWER, MAX_WAITING, Orders
from kvfabric.rpc.v1.control_pb2 import Command
from kvfabric.types import NodeId

N0, N1 = NodeId("n0"), NodeId("n1")


def pull(number: int, why: str = "", size: int = 32) -> Command:
    return Command(why=why, pull=Command.Pull(source=f"s{number}", keys=b"k" * size))


def test_a_node_takes_its_own_commands_once_and_in_order() -> None:
    orders = Orders()
    ids = [orders.post(N0, pull(1, "first")), orders.post(N0, pull(2))]
    other = orders.post(N1, pull(1))
    assert ids == [1, 2]
    assert other == 3
    taken = orders.take(N0)
    assert [(each.id, each.pull.source, each.why) for each in taken] == [
        (1, "s1", "first"),
        (2, "s2", ""),
    ]
    assert orders.take(N0) == ()
    assert orders.waiting(N1) == 1


def test_what_waits_already_is_not_posted_twice_but_what_was_taken_is() -> None:
    orders = Orders()
    first = orders.post(N0, pull(1, "a reason"))
    assert orders.post(N0, pull(1, "another reason")) == first
    assert len(orders.take(N0)) == 1
    assert orders.post(N0, pull(1)) != first


def test_an_answer_carries_a_limited_number() -> None:
    orders = Orders()
    for number in range(MAX_PER_ANSWER + 1):
        orders.post(N0, pull(number))
    assert len(orders.take(N0)) == MAX_PER_ANSWER
    assert len(orders.take(N0)) == 1


def test_an_answer_carries_limited_bytes_and_a_large_command_goes_alone() -> None:
    orders = Orders()
    for number in range(3):
        orders.post(N0, pull(number, size=MAX_ANSWER_BYTES + 32))
    assert [len(orders.take(N0)) for _ in range(4)] == [1, 1, 1, 0]


def test_a_full_queue_takes_no_more_and_says_so() -> None:
    orders = Orders()
    for number in range(MAX_WAITING):
        assert orders.post(N0, pull(number))
    assert orders.post(N0, pull(MAX_WAITING)) == 0
    assert orders.post(N0, pull(0)) == 1
    assert orders.refused == 1
    orders.check()


def test_withdrawn_and_forgotten_commands_are_not_taken() -> None:
    orders = Orders()
    first, second = orders.post(N0, pull(1)), orders.post(N0, pull(2))
    orders.withdraw([first])
    assert [each.id for each in orders.take(N0)] == [second]
    orders.post(N0, pull(3))
    orders.forget(N0)
    assert orders.take(N0) == ()


def test_a_command_is_copied_when_it_is_posted() -> None:
    orders = Orders()
    command = pull(1)
    orders.post(N0, command)
    command.pull.source = "changed"
    orders.check()
    assert orders.take(N0)[0].pull.source == "s1"


def test_a_command_that_wants_nothing_is_a_bug() -> None:
    with pytest.raises(Broken, match="wants nothing"):
        Orders().post(N0, Command(why="no reason"))
