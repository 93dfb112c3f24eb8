"""Lending between a few nodes on a network that behaves."""

from __future__ import annotations

import pytest

from kvfabric.lending.loans import LoanState
from kvfabric.rpc.v1 import control_pb2, node_pb2, types_pb2
from kvfabric.types import Key
from kvfabric_nodes.lending.borrowing import RECLAIM_S
from kvfabric_nodes.lending.instructions import AskCreditors
from kvfabric_nodes.lending.room import RoomState

from .conftest import SHARD_BYTES, key
from .lenders import SLOTS, Node, Town

CAP = SLOTS // 2


def fill(node: Node, first: int, count: int = SLOTS) -> list[Key]:
    """Blocks that the node needs, all at home."""
    keys = [key(first + number) for number in range(count)]
    assert all(node.put(each) for each in keys)
    return keys


def lend(town: Town, debtor: str = "a", first: int = 0) -> list[Key]:
    """The debtor's memory is full, and some of it on loan by then."""
    keys = fill(town[debtor], first)
    room = town[debtor].make_room()
    town.until(lambda: not room.waiting)
    assert room.state is RoomState.DONE
    town.until(lambda: settled(town))
    return keys


def settled(town: Town) -> bool:
    states = {loan.state for node in town.everybody() for loan in node.loans()}
    return states <= {LoanState.HELD}


def where(node: Node, keys: list[Key]) -> set[str]:
    """Which nodes have these for us."""
    places = (node.lending.whereabouts(node.namespace, each) for each in keys)
    return {place or node.name for place in places}


@pytest.fixture
def town() -> Town:
    return Town(["a", "b", "c"])


def test_a_full_node_lends_its_oldest_blocks_out_and_finds_them_again(town: Town) -> None:
    a, b = town["a"], town["b"]
    keys = lend(town)

    assert a.lending.whereabouts(a.namespace, keys[0]) == "b"
    assert a.shard(keys[0]) is None
    assert b.read(keys[0]) == keys[0]
    assert a.told(keys[0]) == ["committed", "lent"]
    assert "kept" in b.told(keys[0])
    assert a.put(key(100))
    assert not town.missing()
    town.check()
    town.check_balance()


def test_a_sequence_grows_to_many_times_its_home(town: Town) -> None:
    town = Town(["a", *(f"n{number}" for number in range(8))])
    a = town["a"]
    keys = [key(number) for number in range(4 * SLOTS)]

    assert all(a.grow(each) for each in keys)

    assert len(where(a, keys)) > 6
    assert not town.missing()
    town.run(5)
    town.check()
    town.check_balance()
    assert a.lending.borrowed_bytes >= 3 * SLOTS * SHARD_BYTES


def test_nothing_is_borrowed_block_by_block(town: Town) -> None:
    town = Town(["a", "b"], cap_bytes=SLOTS * SHARD_BYTES)
    a = town["a"]
    for number in range(SLOTS + 8):
        assert a.grow(key(number))
    town.run(5)
    assert len(a.borrowed()) < 8


def test_room_fails_with_a_reason_when_nobody_lends(town: Town) -> None:
    for name in ("a", "b", "c"):
        fill(town[name], 100 * ord(name))
    town.run(1)

    room = town["a"].make_room()
    town.until(lambda: not room.waiting)

    assert room.state is RoomState.FAILED
    assert "no" in room.reason
    again = town["a"].make_room()
    assert again.state is RoomState.FAILED
    assert again.reason == room.reason, "nobody is asked again at once"
    town.run(60)
    town.check_balance()
    assert not town["a"].loans()


def test_without_its_manager_a_node_borrows_nothing_and_says_so(town: Town) -> None:
    fill(town["a"], 0)
    town.weather.manager = False
    room = town["a"].make_room()
    town.until(lambda: not room.waiting)
    assert "manager" in room.reason


def test_a_creditor_that_the_directory_does_not_show_gets_no_last_copy(town: Town) -> None:
    a, b = town["a"], town["b"]
    keys = fill(a, 0)
    town.run(1)
    room = a.make_room()
    town.until(lambda: bool(b.loans()))
    town.weather.manager = False
    town.run(10)

    assert room.waiting
    assert all(a.shard(each) for each in keys)
    assert b.lent()[0].state is LoanState.HELD
    town.weather.manager = True
    town.until(lambda: not room.waiting)
    assert room.state is RoomState.DONE


def test_a_copy_under_a_lease_is_dropped_when_the_lease_ends(town: Town) -> None:
    a = town["a"]
    keys = fill(a, 0)
    room = a.make_room()
    town.until(lambda: bool(town["b"].loans()))
    leased = [a.desk.lease([each], 100.0) for each in keys]
    town.run(5)
    assert room.waiting
    assert all(a.shard(each) for each in keys)

    a.core.release(a.desk.session, leased)
    town.until(lambda: not room.waiting)
    assert room.state is RoomState.DONE


def test_room_that_leases_hold_is_waited_for(town: Town) -> None:
    a = town["a"]
    leased = [a.desk.lease([each], 100.0) for each in fill(a, 0)]
    room = a.make_room()
    town.run(1.5)
    assert room.waiting

    a.core.release(a.desk.session, leased[-3:])
    town.until(lambda: not room.waiting)
    assert room.state is RoomState.DONE
    assert all(a.shard(key(number)) for number in range(SLOTS - 3))

    a.core.release(a.desk.session, leased)


def test_room_is_not_waited_for_behind_a_loan_that_a_lease_holds_up(town: Town) -> None:
    a = town["a"]
    keys = fill(a, 0)
    town.weather.pull_s = 1.0
    room = a.make_room()
    town.until(lambda: bool(town["b"].loans()))
    held = a.desk.lease(keys[:3], 100.0)
    town.until(lambda: not room.waiting, 10.0)

    assert room.state is RoomState.DONE
    assert all(a.shard(each) for each in keys[:3])
    a.core.release(a.desk.session, [held])


def test_room_comes_too_when_blocks_here_are_needed_no_more(town: Town) -> None:
    town.weather.manager = False
    a = town["a"]
    leased = [a.desk.lease([each], 100.0) for each in fill(a, 0)]
    room = a.make_room()
    town["a"].forget(key(3))
    assert room.state is RoomState.DONE
    a.core.release(a.desk.session, leased)


def test_what_is_needed_no_more_is_returned_and_stays_as_cache(town: Town) -> None:
    a, b = town["a"], town["b"]
    keys = lend(town)
    lent = [each for each in keys if a.shard(each) is None]

    for each in lent:
        a.forget(each)
    town.run(5)

    assert not a.loans()
    assert not b.loans()
    assert all(b.shard(each) is not None for each in lent)
    assert not any(b.core.shards.claims(b.namespace, each) for each in lent)
    assert "returned" in a.told(lent[0])


def test_what_is_discarded_is_dropped_at_the_creditor_too(town: Town) -> None:
    a, b = town["a"], town["b"]
    keys = lend(town)
    lent = [each for each in keys if a.shard(each) is None]

    for each in lent:
        a.forget(each, drop=True)
    town.run(5)

    assert not a.loans()
    assert not any(b.shard(each) for each in lent)


def test_a_block_that_comes_home_by_itself_ends_its_loan(town: Town) -> None:
    a, b = town["a"], town["b"]
    keys = lend(town)
    lent = [each for each in keys if a.shard(each) is None]

    assert a.put(lent[0])
    town.run(5)

    assert a.lending.whereabouts(a.namespace, lent[0]) is None
    assert b.shard(lent[0]) is None
    town.check_balance()


def test_a_creditor_lends_no_more_than_its_cap(town: Town) -> None:
    town = Town(["a", "b"], cap_bytes=3 * SHARD_BYTES)
    a = town["a"]
    keys = [key(number) for number in range(2 * SLOTS)]
    grown = [each for each in keys if a.grow(each)]
    assert len(grown) == SLOTS + 3
    assert town["b"].lending.lent_bytes == 3 * SHARD_BYTES


def test_a_creditor_evicts_cache_for_a_loan_but_nothing_that_is_needed(town: Town) -> None:
    town = Town(["a", "b"], cap_bytes=SLOTS * SHARD_BYTES)
    a, b = town["a"], town["b"]
    needed = fill(b, 500, SLOTS // 2)
    cache = [key(600 + number) for number in range(SLOTS // 2)]
    assert all(b.put(each, need=False) for each in cache)

    grown = [number for number in range(2 * SLOTS) if a.grow(key(number))]

    assert len(grown) == SLOTS + SLOTS // 2
    assert all(b.shard(each) for each in needed)
    assert not any(b.shard(each) for each in cache)


def test_a_creditor_that_owes_lends_only_as_the_last_resort() -> None:
    town = Town(["a", "b", "c"], cap_bytes=SLOTS * SHARD_BYTES)
    a, b = town["a"], town["b"]
    fill(a, 0)
    fill(town["c"], 300, SLOTS - 4)
    lend(town, "b", first=200)
    assert {loan.creditor for loan in b.borrowed()} == {"c"}
    for each in list(b.needed)[-8:]:
        b.forget(each)
    town.run(1)

    assert town.creditors("a", AskCreditors(0, 1, ())).nodes[0] == "b"
    for number in range(100, 104):
        assert a.grow(key(number))
    town.run(5)

    first, *_, last = a.borrowed()
    assert first.creditor == "c"
    assert last.creditor == "b"
    assert not town.missing()
    town.check_balance()


def test_a_drained_node_lends_nothing(town: Town) -> None:
    town["b"].core.draining = True
    lend(town)
    assert {loan.creditor for loan in town["a"].borrowed()} == {"c"}


def test_a_creditor_that_needs_room_takes_it_back_and_the_debtor_moves_on(town: Town) -> None:
    a, b = town["a"], town["b"]
    lent = [each for each in lend(town) if a.shard(each) is None]
    fill(a, 100, len(lent))
    fill(b, 500, SLOTS - len(lent))

    room = b.make_room()
    town.until(lambda: not room.waiting)
    town.run(5)

    assert room.state is RoomState.DONE
    assert b.put(key(999))
    assert where(a, lent) == {"b", "c"}
    assert not town.missing()
    assert "recalled" in a.told(lent[0])
    town.check_balance()


def test_a_recall_brings_blocks_home_where_there_is_room(town: Town) -> None:
    a, b = town["a"], town["b"]
    keys = lend(town)
    lent = [each for each in keys if a.shard(each) is None]
    for each in keys:
        if each not in lent:
            a.forget(each)
    recall = control_pb2.Command.Recall(debtor="a")
    b.lending.command(control_pb2.Command(id=1, recall=recall), 1, town.now_s)
    b.carry_out()
    town.run(5)

    assert where(a, lent) == {"a"}
    assert not a.loans()
    assert not b.loans()
    assert not any(b.shard(each) for each in lent)


def test_a_recall_that_comes_before_the_loan_is_known_is_said_again() -> None:
    town = Town(["a", "b", "c"], recall_s=500.0)
    a, b = town["a"], town["b"]
    fill(a, 0)
    town.weather.lost_message = 2  # the answer to Lend
    a.make_room()
    town.until(lambda: bool(b.loans()))
    recall = control_pb2.Command.Recall(debtor="a")
    b.lending.command(control_pb2.Command(id=1, recall=recall), 1, town.now_s)
    b.carry_out()
    town.run(1)
    assert a.borrowed()[0].state is LoanState.REQUESTED
    town.run(10)

    assert not b.loans()
    assert not town.missing()
    town.check_balance()


def test_what_a_node_keeps_for_another_is_not_lent_on() -> None:
    town = Town(["a", "b", "c"], cap_bytes=SLOTS * SHARD_BYTES)
    a, b = town["a"], town["b"]
    fill(town["c"], 300, SLOTS - 4)
    lent = [each for each in lend(town) if a.shard(each) is None]
    for each in lent:
        b.need(each)
    fill(b, 500, SLOTS - len(lent))

    what = control_pb2.Command.LendOut(sequence=7, size_bytes=4 * SHARD_BYTES, creditor="c")
    b.lending.command(control_pb2.Command(id=1, lend_out=what), 1, town.now_s)
    b.carry_out()
    town.run(5)

    assert b.borrowed()
    assert all(b.shard(each) for each in lent)
    assert not any("kept" in town["c"].told(each) for each in lent)


def test_a_debtor_learns_of_a_replica_that_its_creditor_dropped(town: Town) -> None:
    a, b = town["a"], town["b"]
    lent = [each for each in lend(town) if a.shard(each) is None]
    shard = b.shard(lent[0])
    assert shard is not None
    b.core.drop(shard, "damaged", "by a test", town.now_s)
    town.run(town.terms.loan_s / 2)
    assert a.lending.whereabouts(a.namespace, lent[0]) is None
    town.run(RECLAIM_S)

    assert a.told(lent[0])[-2:] == ["loan ended", "lost"]
    assert where(a, lent[1:]) == {"b"}
    town.check_balance()


def test_a_creditor_that_does_not_answer_holds_nobody_up_for_long(town: Town) -> None:
    a = town["a"]
    town.weather.cut.add(frozenset("ab"))
    assert town.creditors("a", AskCreditors(0, 1, ())).nodes[0] == "b"
    fill(a, 0)

    room = a.make_room(timeout_s=town.weather.call_s + 1.0)
    town.until(lambda: not room.waiting)
    assert room.state is RoomState.DONE
    begun_s = town.now_s
    for number in range(100, 106):
        assert a.grow(key(number))
    assert town.now_s < begun_s + town.weather.call_s

    town.run(60)
    town.weather.cut.clear()
    town.run(60)
    assert {loan.creditor for loan in a.borrowed()} == {"c"}
    assert not town.missing()
    town.check_balance()


def test_a_creditor_that_stays_silent_is_given_up(town: Town) -> None:
    a = town["a"]
    lent = [each for each in lend(town) if a.shard(each) is None]
    town.weather.cut.add(frozenset("ab"))
    town.run(200)

    assert not a.loans()
    assert a.told(lent[0])[-1] == "not claimed"
    assert where(a, lent) == {"a"}


def test_a_recall_that_nobody_can_follow_is_taken_at_its_deadline() -> None:
    town = Town(["a", "b"], cap_bytes=SLOTS * SHARD_BYTES, recall_s=5.0)
    a, b = town["a"], town["b"]
    lent = [each for each in lend(town) if a.shard(each) is None]
    while a.put(key(900 + len(a.needed))):
        pass
    fill(b, 500, SLOTS - len(lent))

    room = b.make_room()
    town.run(2)
    assert room.waiting
    town.run(10)

    assert room.state is RoomState.DONE
    assert town.missing()["a"]
    assert a.lending.whereabouts(a.namespace, town.missing()["a"][0]) is None
    town.run(40)
    town.check_balance()


def test_a_recall_does_not_give_up_what_was_damaged_at_home_meanwhile(town: Town) -> None:
    a, b = town["a"], town["b"]
    fill(a, 0)
    a.make_room()
    town.until(lambda: bool(b.loans()) and b.lent()[0].state is LoanState.HELD)
    town.weather.manager = False  # nothing is seen yet
    for number in range(2):
        shard = a.shard(key(number))
        assert shard is not None
        a.core.drop(shard, "damaged", "by a test", town.now_s)
    recall = control_pb2.Command.Recall(debtor="a")
    b.lending.command(control_pb2.Command(id=1, recall=recall), 1, town.now_s)
    b.carry_out()
    town.run(5)

    assert not town.missing()
    assert a.lending.whereabouts(a.namespace, key(0)) == "b"


def test_two_debtors_race_for_the_last_room() -> None:
    town = Town(["a", "b", "c"], cap_bytes=SLOTS * SHARD_BYTES)
    for name, first in (("a", 0), ("b", 100)):
        fill(town[name], first)
    fill(town["c"], 300, SLOTS - 3)
    town.run(1)

    rooms = [town[name].make_room(2) for name in ("a", "b")]
    town.until(lambda: not any(room.waiting for room in rooms))
    town.run(5)

    assert sorted(room.state.value for room in rooms) == ["done", "failed"]
    assert town["c"].lending.lent_bytes == 3 * SHARD_BYTES
    assert not town.missing()
    town.check_balance()


def test_the_manager_has_a_sequence_lent_to_whom_it_names(town: Town) -> None:
    a = town["a"]
    keys = fill(a, 0, 8)
    what = control_pb2.Command.LendOut(
        sequence=7,
        size_bytes=3 * SHARD_BYTES,
        creditor="c",
        endpoints=types_pb2.Endpoints(host="c"),
    )
    command = control_pb2.Command(id=1, why="gains 5 tokens/s", lend_out=what)
    for _ in range(3):
        a.lending.command(command, 1, town.now_s)
        a.carry_out()
        town.run(2)

    assert [a.lending.whereabouts(a.namespace, each) for each in keys[:4]] == ["c"] * 3 + [None]
    town.check_balance()


def test_the_manager_has_a_loan_brought_home(town: Town) -> None:
    a = town["a"]
    keys = lend(town)
    lent = [each for each in keys if a.shard(each) is None]
    for each in keys[-4:]:
        a.forget(each)
    for loan in a.borrowed():
        home = control_pb2.Command.BringHome(loan=loan.loan)
        for _ in range(2):
            a.lending.command(control_pb2.Command(id=2, bring_home=home), 1, town.now_s)
    a.carry_out()
    town.run(5)

    assert where(a, lent) == {"a"}
    assert not town["b"].loans()
    assert not town.missing()


def test_circular_debts_are_repaid_by_bringing_home() -> None:
    town = Town(["a", "b"], cap_bytes=SLOTS * SHARD_BYTES, lend_while_owing=True)
    a, b = town["a"], town["b"]
    of_a = lend(town, "a")
    for each in of_a[-6:]:
        a.forget(each)
    fill(b, 500, SLOTS - len(b.core.shards.room(b.namespace)))
    what = control_pb2.Command.LendOut(sequence=7, size_bytes=2048, creditor="a")
    b.lending.command(control_pb2.Command(id=1, lend_out=what), 1, town.now_s)
    b.carry_out()
    town.run(5)
    assert a.lent()
    assert b.lent()

    for node in (a, b):
        for loan in node.borrowed():
            home = control_pb2.Command.BringHome(loan=loan.loan)
            node.lending.command(control_pb2.Command(id=3, bring_home=home), 1, town.now_s)
        node.carry_out()
    town.run(5)

    assert not a.loans()
    assert not b.loans()
    assert not town.missing()


# Lives and deaths -----------------------------------------------------------------------


def test_a_debtor_that_starts_anew_has_no_loans(town: Town) -> None:
    lend(town)
    b = town["b"]
    assert b.lent()
    town.restart("a")
    town["b"].lending.peer_lost("a", 2, town.now_s)
    assert not b.lent()
    assert not b.core.books().reserved_bytes


def test_a_debtor_that_dies_is_forgotten_by_its_deadline(town: Town) -> None:
    lend(town)
    town.restart("a")
    town.run(town.terms.loan_s + 1)
    assert not town["b"].loans()


def test_a_creditor_that_starts_anew_has_lost_what_was_lent(town: Town) -> None:
    a = town["a"]
    lent = [each for each in lend(town) if a.shard(each) is None]
    town.restart("b")
    town.run(town.terms.loan_s + RECLAIM_S)

    assert town.missing()["a"] == lent
    assert where(a, lent) == {"a"}
    assert not a.loans()
    assert "lost" in a.told(lent[0])


def test_what_a_creditor_that_came_back_still_has_is_claimed_anew(town: Town) -> None:
    a = town["a"]
    lent = [each for each in lend(town) if a.shard(each) is None]
    b = town.restart("b")
    for each in lent[1:]:
        b.put(each, need=False)
    a.lending.peer_lost("b", 2, town.now_s)
    a.carry_out()
    town.run(5)

    assert town.missing().get("a", []) == lent[:1]
    assert [a.lending.whereabouts(a.namespace, each) for each in lent] == [
        None,
        *["b"] * (len(lent) - 1),
    ]
    town.check_balance()


def test_a_lost_creditor_takes_what_only_it_had(town: Town) -> None:
    a = town["a"]
    lent = [each for each in lend(town) if a.shard(each) is None]
    a.lending.peer_lost("b", 0, town.now_s)
    assert where(a, lent) == {"a"}
    assert not a.loans()


def test_a_partition_shorter_than_the_loan_is_not_noticed(town: Town) -> None:
    lend(town)
    town.weather.cut.add(frozenset("ab"))
    town.run(town.terms.loan_s / 2)
    town.weather.cut.clear()
    town.run(town.terms.loan_s)
    assert not town.missing()
    town.check_balance()


def test_after_a_long_partition_what_is_still_there_is_claimed_anew(town: Town) -> None:
    a = town["a"]
    lend(town)
    town.weather.cut.add(frozenset("ab"))
    town.run(1.5 * town.terms.loan_s)
    assert not town["b"].loans()
    town.weather.cut.clear()
    town.run(town.terms.loan_s)
    assert not town.missing()
    assert a.lending.borrowed_bytes
    town.check_balance()


def test_a_source_that_dies_before_the_bytes_came_leaves_nothing_reserved(town: Town) -> None:
    town.weather.pull_s = 1.0
    fill(town["a"], 0)
    town["a"].make_room()
    town.until(lambda: bool(town["b"].loans()))
    assert town["b"].core.books().reserved_bytes
    town.restart("a")
    town.run(3)
    assert not town["b"].core.books().reserved_bytes
    assert not town["b"].loans()


def test_a_late_lend_does_not_raise_a_loan_that_has_ended(town: Town) -> None:
    a, b = town["a"], town["b"]
    keys = fill(a, 0, 2)
    request = node_pb2.LendRequest(
        loan=5,
        debtor="a",
        debtor_incarnation=1,
        source="a",
        namespace_id=a.namespace,
        tenant="a",
        keys=keys,
        size_bytes=[SHARD_BYTES],
        deadline_ms=1000,
    )
    back = node_pb2.ReturnLoanRequest(debtor="a", debtor_incarnation=1, loan=5)
    b.lending.return_loan(back, town.now_s)
    answer = b.lending.lend(request, town.now_s)
    assert not b.loans()
    assert "ended" in answer.reason
