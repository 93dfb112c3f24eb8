"""What is to be dropped: leases first, then a holder's word, and nothing without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import Key
from kvfabric_nodes.orders.drops import (
    DROP_S,
    FRESH_S,
    MAX_ASKED,
    MAX_QUESTIONS,
    Drops,
    Keep,
    Question,
)
from kvfabric_nodes.sequences.groups import Groups
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extents
from kvfabric_nodes.store.promises import Limits

from .conftest import SEGMENT_BYTES, SHARD_BYTES, Desk, key

KEYS = [key(number) for number in range(8)]


@pytest.fixture
def drops(core: NodeCore, desk: Desk) -> Iterator[Drops]:
    """The desk holds eight shards."""
    desk.put(KEYS)
    drops = Drops(core)
    yield drops
    drops.check()


def begin(drops: Drops, desk: Desk, keys: Sequence[Key], *holders: str) -> None:
    named = [
        control_pb2.Command.Drop.Holder(
            node=name, endpoints=types_pb2.Endpoints(unix_path=f"/{name}")
        )
        for name in holders
    ]
    drops.begin(desk.namespace, keys, named, "moved", "says the test", desk.now_s)


def asked(drops: Drops) -> list[Question]:
    questions, drops.questions = drops.questions, []
    return questions


def only(drops: Drops) -> Question:
    (question,) = asked(drops)
    return question


def test_a_holder_is_asked_and_what_it_has_goes(drops: Drops, desk: Desk) -> None:
    begin(drops, desk, KEYS[:4], "b")
    assert not drops.tick(0.0)
    question = only(drops)
    assert (question.node, question.namespace, question.keys) == (
        "b",
        desk.namespace,
        tuple(KEYS[:4]),
    )
    assert types_pb2.Endpoints.FromString(question.endpoints).unix_path == "/b"
    assert all(desk.holds(KEYS))

    assert drops.answered(question, KEYS[1:3], 0.1)
    assert desk.holds(KEYS[:4]) == [True, False, False, True]
    assert len(drops) == 0


def test_an_answer_of_nothing_drops_nothing(drops: Drops, desk: Desk) -> None:
    begin(drops, desk, KEYS, "b")
    drops.tick(0.0)
    assert not drops.answered(only(drops), (), 0.1)
    assert all(desk.holds(KEYS))
    assert len(drops) == 0


def test_one_question_asks_for_several_commands(drops: Drops, desk: Desk) -> None:
    begin(drops, desk, KEYS[:2], "b")
    begin(drops, desk, KEYS[2:4], "b")
    begin(drops, desk, KEYS[4:6], "c")
    drops.tick(0.0)
    assert [question.keys for question in asked(drops)] == [tuple(KEYS[:4]), tuple(KEYS[4:6])]
    drops.tick(0.1)
    assert not asked(drops)  # they are under way


def test_what_a_holder_lacks_the_next_one_is_asked_for(drops: Drops, desk: Desk) -> None:
    begin(drops, desk, KEYS[:3], "b", "c")
    drops.tick(0.0)
    drops.answered(only(drops), KEYS[:1], 0.1)
    question = only(drops)
    assert (question.node, question.keys) == ("c", tuple(KEYS[1:3]))
    drops.answered(question, KEYS[1:2], 0.2)
    assert desk.holds(KEYS[:3]) == [False, False, True]
    assert not asked(drops)


def test_nobody_is_asked_while_it_is_leased(drops: Drops, desk: Desk) -> None:
    lease = desk.lease(KEYS[:1])
    begin(drops, desk, KEYS[:1], "b")
    drops.tick(0.0)
    assert not asked(drops)
    desk.core.release(desk.session, [lease])
    drops.tick(0.1)
    assert only(drops).keys == (KEYS[0],)


def test_what_is_leased_while_it_is_asked_for_is_asked_for_again(drops: Drops, desk: Desk) -> None:
    begin(drops, desk, KEYS[:1], "b")
    drops.tick(0.0)
    question = only(drops)
    lease = desk.lease(KEYS[:1])
    assert not drops.answered(question, KEYS[:1], 0.1)
    assert desk.holds(KEYS[:1]) == [True]
    desk.core.release(desk.session, [lease])
    drops.tick(0.2)
    drops.answered(only(drops), KEYS[:1], 0.3)
    assert desk.holds(KEYS[:1]) == [False]


def test_what_is_needed_while_it_is_asked_for_stays(drops: Drops, desk: Desk) -> None:
    begin(drops, desk, KEYS[:3], "b")
    drops.tick(0.0)
    desk.core.shards.claim(desk.namespace, KEYS[0])
    desk.core.pin(desk.session, desk.namespace, KEYS[1:2])
    drops.answered(only(drops), KEYS[:3], 0.1)
    assert desk.holds(KEYS[:3]) == [True, True, False]
    assert len(drops) == 1  # the pin may follow


def test_a_pin_follows_its_shard(drops: Drops, desk: Desk) -> None:
    desk.core.pin(desk.session, desk.namespace, KEYS[:1])
    begin(drops, desk, KEYS[:2], "b")
    drops.tick(0.0)
    question = only(drops)
    assert question.pinned == (KEYS[0],)

    drops.answered(question, KEYS[1:2], 0.1)  # "b" has both, but did not pin
    assert desk.holds(KEYS[:2]) == [True, False]
    begin(drops, desk, KEYS[:1], "c")
    drops.tick(0.2)
    drops.answered(only(drops), KEYS[:1], 0.3)

    assert desk.holds(KEYS[:1]) == [False]
    assert desk.core.pins == 0


def test_a_pin_that_comes_while_the_holder_is_asked_follows_too(drops: Drops, desk: Desk) -> None:
    begin(drops, desk, KEYS[:1], "b")
    drops.tick(0.0)
    question = only(drops)
    desk.core.pin(desk.session, desk.namespace, KEYS[:1])
    drops.answered(question, KEYS[:1], 0.1)
    assert desk.holds(KEYS[:1]) == [True]

    drops.tick(0.2)
    again = only(drops)
    assert again.pinned == (KEYS[0],)
    drops.answered(again, KEYS[:1], 0.3)
    assert desk.holds(KEYS[:1]) == [False]


def test_what_is_pinned_and_lies_nowhere_else_stays(drops: Drops, desk: Desk) -> None:
    desk.core.pin(desk.session, desk.namespace, KEYS[:1])
    begin(drops, desk, KEYS[:2])
    drops.tick(0.0)
    assert desk.holds(KEYS[:2]) == [True, False]


def test_what_groups_keep_is_kept_for_them_by_the_holder(desk: Desk) -> None:
    desk.put(KEYS)
    groups = Groups(desk.core)
    drops = Drops(desk.core, groups)
    first = groups.open(desk.session, desk.namespace, KEYS[:2], 50.0, 0.0)
    second = groups.open(desk.session, desk.namespace, KEYS[1:3], 90.0, 0.0)
    begin(drops, desk, KEYS[:3], "b")
    drops.tick(10.0)
    question = only(drops)
    assert question.groups == (
        Keep(first.id, (KEYS[0], KEYS[1]), 40.0),
        Keep(second.id, (KEYS[1], KEYS[2]), 80.0),
    )

    drops.answered(question, KEYS[:2], 10.1, {first.id: 7, second.id: 8})

    assert desk.holds(KEYS[:3]) == [False, False, True]
    assert groups.close(desk.session, first.id, 11.0) == (0, 0)
    assert [(place.node, place.group) for place in groups.to_close] == [("b", 7)]
    assert list(second.keys) == [KEYS[2]]
    groups.check()
    drops.check()


def test_a_group_is_kept_until_a_fresh_answer_and_closed_elsewhere_all_the_same(
    desk: Desk,
) -> None:
    desk.put(KEYS)
    groups = Groups(desk.core)
    drops = Drops(desk.core, groups)
    group = groups.open(desk.session, desk.namespace, KEYS[:1], 50.0, 0.0)
    begin(drops, desk, KEYS[:1], "b")
    drops.tick(0.0)
    drops.answered(only(drops), KEYS[:1], FRESH_S + 1.0, {group.id: 7})
    assert (desk.holds(KEYS[:1]), list(group.keys)) == ([True], KEYS[:1])

    desk.core.close_session(desk.session, 5.0)
    assert [place.group for place in groups.to_close] == [7]


def test_what_a_sequence_or_a_state_claims_beside_a_group_stays(desk: Desk) -> None:
    desk.put(KEYS)
    groups = Groups(desk.core)
    drops = Drops(desk.core, groups)
    groups.open(desk.session, desk.namespace, KEYS[:1], 50.0, 0.0)
    desk.core.shards.claim(desk.namespace, KEYS[0])
    begin(drops, desk, KEYS[:1], "b")
    drops.tick(0.0)
    assert not asked(drops)


def test_a_new_shard_of_the_same_key_is_not_the_one_that_was_asked_for(
    drops: Drops, desk: Desk
) -> None:
    begin(drops, desk, KEYS[:1], "b")
    drops.tick(0.0)
    desk.core.purge(desk.session, desk.namespace, KEYS[:1], "", 0.0)
    desk.put(KEYS[:1])
    drops.answered(only(drops), KEYS[:1], 0.1)
    assert desk.holds(KEYS[:1]) == [True]


def test_an_answer_that_comes_late_drops_nothing(drops: Drops, desk: Desk) -> None:
    """This node was stopped between the question and the answer."""
    begin(drops, desk, KEYS[:1], "b")
    drops.tick(0.0)
    assert not drops.answered(only(drops), KEYS[:1], FRESH_S + 0.1)
    assert desk.holds(KEYS[:1]) == [True]


def test_a_drop_is_void_after_a_while_whatever_is_answered(drops: Drops, desk: Desk) -> None:
    desk.lease(KEYS[:1], 100.0)
    begin(drops, desk, KEYS[:2], "b")
    drops.tick(0.0)
    asked(drops)
    drops.tick(DROP_S)
    assert len(drops) == 0

    begin(drops, desk, KEYS[2:3], "b")  # at 0.0 by the desk's clock
    drops.tick(DROP_S - 0.1)
    assert not drops.answered(only(drops), KEYS[2:3], DROP_S)
    assert desk.holds(KEYS[:3]) == [True, True, True]


def test_a_drop_that_is_said_again_waits_longer_and_for_whom_it_names_last(
    drops: Drops, desk: Desk
) -> None:
    lease = desk.lease(KEYS[:2], 100.0)
    begin(drops, desk, KEYS[:2], "b")
    desk.now_s = 10.0
    begin(drops, desk, KEYS[:1], "b")
    begin(drops, desk, KEYS[1:2], "c")
    drops.tick(DROP_S + 1)
    assert len(drops) == 2
    desk.core.release(desk.session, [lease])
    drops.tick(DROP_S + 2)
    assert [question.node for question in asked(drops)] == ["b", "c"]


def test_what_is_called_off_stays_whatever_is_answered(drops: Drops, desk: Desk) -> None:
    begin(drops, desk, KEYS, "b")
    drops.tick(0.0)
    question = only(drops)
    drops.clear()
    begin(drops, desk, KEYS[:2], "b")
    assert not drops.answered(question, KEYS, 0.1)
    assert all(desk.holds(KEYS))
    drops.tick(0.2)
    assert only(drops).keys == tuple(KEYS[:2])


def test_without_holders_nobody_is_asked(drops: Drops, desk: Desk) -> None:
    begin(drops, desk, KEYS[:2])
    assert drops.tick(0.0)
    assert desk.holds(KEYS[:3]) == [False, False, True]


def test_questions_and_their_keys_are_limited(desk: Desk) -> None:
    count = (MAX_QUESTIONS + 2) * MAX_ASKED
    core = NodeCore(Extents(count // 64, SEGMENT_BYTES), Limits(batch_keys=count))
    large = Desk(core)
    keys = [key(number) for number in range(count)]
    large.put(keys, 64)
    drops = Drops(core)
    begin(drops, large, keys, "b")
    drops.tick(0.0)
    questions = asked(drops)
    assert [len(question.keys) for question in questions] == [MAX_ASKED] * MAX_QUESTIONS
    drops.check()
    drops.answered(questions[0], questions[0].keys, 0.1)
    drops.tick(0.2)
    assert len(asked(drops)) == 1
    drops.check()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_nothing_goes_that_no_fresh_answer_confirmed(data: st.DataObject) -> None:
    """Against a list of what was confirmed, in any order of events."""
    core = NodeCore(Extents(4, SEGMENT_BYTES), Limits(deadline_s=100.0))
    desk = Desk(core)
    desk.put(KEYS, SHARD_BYTES)
    drops = Drops(core)
    waiting: list[Question] = []
    leases: list[int] = []
    confirmed: set[Key] = set()
    some = st.lists(st.sampled_from(KEYS), unique=True)
    for _ in range(data.draw(st.integers(1, 25))):
        before = {k for k, held in zip(KEYS, desk.holds(KEYS), strict=True) if held}
        confirmed = set()
        match data.draw(st.sampled_from(["begin", "tick", "answer", "lease", "release", "clear"])):
            case "begin":
                holders = data.draw(st.permutations(["b", "c"]))
                begin(drops, desk, data.draw(some), *holders[: data.draw(st.integers(1, 2))])
            case "tick":
                desk.wait(data.draw(st.sampled_from([0.0, 1.0, 4.0])))
                drops.tick(desk.now_s)
            case "answer" if waiting:
                question = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
                held = set(data.draw(some)).intersection(question.keys)
                if desk.now_s <= question.asked_s + FRESH_S:
                    confirmed = held
                drops.answered(question, held, desk.now_s)
            case "lease" if before:
                leases.append(desk.lease(sorted(before)[:2], 50.0))
            case "release" if leases:
                core.release(desk.session, [leases.pop()])
            case "clear":
                drops.clear()
        waiting += asked(drops)
        after = {k for k, held in zip(KEYS, desk.holds(KEYS), strict=True) if held}
        assert before - after <= confirmed
        drops.check()
        core.check()
