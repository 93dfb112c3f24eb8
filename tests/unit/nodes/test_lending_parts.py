"""The small parts of lending: stages of a key, requests for room, the search for creditors."""

from __future__ import annotations

import itertools

import pytest

from kvfabric.errors import Broken
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import NamespaceId
from kvfabric_nodes.lending import debts, room
from kvfabric_nodes.lending.debts import Batch, Debt, Stage
from kvfabric_nodes.lending.instructions import AskCreditors
from kvfabric_nodes.lending.post import CALL_S, Post
from kvfabric_nodes.lending.room import ROOMS, Room, Rooms, RoomState
from kvfabric_nodes.lending.rounds import ROUND_S, Offer, Round

from .conftest import key

NOWHERE = types_pb2.Endpoints()
POOL = ("a", 1024)


def debt_of(stage: Stage) -> Debt:
    batch = Batch(NamespaceId(b"n" * 32), "a", 1, 1000, 1024, [key(1)], "a", NOWHERE)
    debt = Debt(1, "b", NOWHERE, batch, "", begun_s=0.0, expires_s=1.0)
    debt.stages[key(1)] = stage
    return debt


def request(count: int = 1, deadline_s: float = 10.0, told: list[Room] | None = None) -> Room:
    return Room(POOL, count * 1024, deadline_s, None if told is None else told.append)


# Tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "to"), list(itertools.product(Stage, repeat=2)))
def test_a_lent_key_goes_by_the_table(stage: Stage, to: Stage) -> None:
    debt = debt_of(stage)
    if to is stage or to in debts.TRANSITIONS[stage]:
        debt.step(key(1), to)
        assert debt.stages[key(1)] is to
    else:
        with pytest.raises(Broken, match=f"{stage.name} cannot become {to.name}"):
            debt.step(key(1), to)


@pytest.mark.parametrize(("state", "to"), list(itertools.product(RoomState, repeat=2)))
def test_a_request_for_room_goes_by_the_table(state: RoomState, to: RoomState) -> None:
    rooms, wanted = Rooms(), request()
    wanted.state = state
    if to in room.TRANSITIONS[state]:
        rooms._end(wanted, to, "why")
        assert wanted.state is to
    else:
        with pytest.raises(Broken, match=f"{state.name} cannot become {to.name}"):
            rooms._end(wanted, to, "why")


# Room -----------------------------------------------------------------------------------


def test_what_comes_free_goes_to_who_came_first() -> None:
    rooms, told = Rooms(), list[Room]()
    first, second = request(2, told=told), request(1, told=told)
    rooms.add(first)
    rooms.add(second)

    rooms.gain(1024)
    assert (first.missing_bytes, second.missing_bytes) == (1024, 1024)
    rooms.check()
    rooms.gain(1536)

    assert told == [first]
    assert second.missing_bytes == 512
    rooms.gain(4096)
    assert told == [first, second]
    assert {r.state for r in told} == {RoomState.DONE}
    assert not rooms
    rooms.check()


def test_requests_end_by_their_deadline_and_who_asked_may_give_up() -> None:
    rooms = Rooms()
    patient, hasty, leaving = request(deadline_s=9.0), request(deadline_s=1.0), request()
    for each in (patient, hasty, leaving):
        rooms.add(each)
    assert rooms.due_s() == 1.0

    rooms.tick(1.0, "b is full")
    rooms.cancel(leaving)
    rooms.cancel(leaving)

    assert rooms.waiting == [patient]
    assert hasty.reason == "no room in time: b is full"
    assert leaving.state is RoomState.FAILED


def test_so_many_wait_and_no_more() -> None:
    rooms = Rooms()
    for _ in range(ROOMS):
        rooms.add(request())
    one_more = request()
    rooms.add(one_more)
    rooms.check()
    assert one_more.state is RoomState.FAILED
    assert "wait already" in one_more.reason


# Creditors ------------------------------------------------------------------------------


def answer(*nodes: str, free_bytes: int = 4096, reason: str = "") -> control_pb2.BorrowResponse:
    return control_pb2.BorrowResponse(
        nodes=nodes,
        endpoints=[NOWHERE] * len(nodes),
        free_bytes=[free_bytes] * len(nodes),
        reason=reason,
    )


def reply(post: Post, response: control_pb2.BorrowResponse | None) -> AskCreditors:
    (asked,) = post.take()
    assert isinstance(asked, AskCreditors)
    post.answered(asked.ticket, response, "it is away", 0.0)
    return asked


def test_creditors_are_asked_in_the_managers_order_until_nobody_is_left() -> None:
    post = Post()
    search = Round(post, ("me",), 0.0)
    assert search.offer(1024, 0.0) is None
    assert reply(post, answer("b", "c", "me")).exclude == ("me",)

    assert search.offer(1024, 0.0) == Offer("b", NOWHERE, 4096)
    search.used("b", 4096)
    assert search.offer(1024, 0.0) == Offer("c", NOWHERE, 4096)
    search.refused("c", "c is full", owes=False)
    assert search.offer(1024, 0.0) is None
    assert reply(post, answer(reason="nobody else")).exclude == ("b", "c", "me")

    assert search.offer(1024, 0.0) is None
    assert search.exhausted
    assert search.reason == "c is full"


def test_who_owes_is_asked_again_at_the_end_and_only_once() -> None:
    post = Post()
    search = Round(post, (), 0.0)
    search.offer(1024, 0.0)
    reply(post, answer("b"))
    search.refused("b", "b has borrowed itself", owes=True)
    search.offer(1024, 0.0)
    reply(post, answer())

    assert not search.exhausted
    assert search.offer(1024, 0.0) == Offer("b", NOWHERE, 4096, last_resort=True)
    search.refused("b", "b is full", owes=True)
    assert search.offer(1024, 0.0) is None
    assert search.exhausted


def test_who_did_not_answer_lately_is_asked_after_the_others() -> None:
    post = Post()
    search = Round(post, (), 0.0, shy=("b",))
    search.offer(1024, 0.0)
    reply(post, answer("b", "c"))
    assert search.offer(1024, 0.0) == Offer("c", NOWHERE, 4096)
    search.used("c", 4096)
    assert search.offer(1024, 0.0) == Offer("b", NOWHERE, 4096)


def test_a_manager_that_is_away_ends_the_search() -> None:
    post = Post()
    search = Round(post, (), 0.0)
    search.offer(1024, 0.0)
    reply(post, None)
    assert search.exhausted
    assert "it is away" in search.reason


def test_a_named_creditor_is_the_only_one_asked() -> None:
    post = Post()
    search = Round(post, (), 0.0, named=Offer("b", NOWHERE, 2048))
    assert search.offer(1024, 0.0) is not None
    search.used("b", 2048)
    assert search.exhausted
    assert not post.take()


def test_what_the_manager_said_grows_old() -> None:
    post = Post()
    search = Round(post, (), 0.0)
    search.offer(1024, 0.0)
    assert not search.old(ROUND_S), "an answer is still to come"
    reply(post, answer("b"))
    assert search.old(ROUND_S)


def test_a_question_is_answered_once_and_ends_by_itself() -> None:
    post, heard = Post(), list[tuple[object, str]]()
    for _ in range(2):
        post.places(NamespaceId(b"n" * 32), [key(1)], lambda a, why, _: heard.append((a, why)), 0.0)
    first, second = post.take()
    assert isinstance(first, type(second))
    assert not post.take()

    post.answered(1, [("b",)], "", 1.0)
    post.answered(1, [("c",)], "", 1.0)
    post.tick(CALL_S)
    post.answered(2, [("d",)], "", CALL_S + 1)

    assert heard == [([("b",)], ""), (None, f"no answer within {CALL_S:g} s")]
    assert post.due_s() == float("inf")
