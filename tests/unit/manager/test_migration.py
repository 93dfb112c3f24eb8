"""Moves by example and by seed: copied, seen, dropped; never the last copy; always an end."""

from __future__ import annotations

import pytest
from tests.unit.manager.small_fabric import (
    OTHER,
    ROOM,
    SHARD_BYTES,
    SmallFabric,
    key,
    keys,
    succeeded,
    unpacked,
)

from kvfabric.errors import Broken, Refused, Retry
from kvfabric.moves.loads import PER_DESTINATION, PER_LINK
from kvfabric.moves.migrating import Wish
from kvfabric.moves.migration import TRANSITIONS, Move, MoveState, check_step
from kvfabric.moves.mover import MAX_MOVES
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Key, NamespaceId, NodeId

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def fabric(seed: int = 0, **chaos: float) -> SmallFabric:
    """Nodes a, b and c; a holds shards 0 to 199."""
    made = SmallFabric(seed, **chaos)
    for name in "abc":
        made.add(name)
    made.put("a", range(200))
    made.run(1)
    return made


def wish(
    *numbers: int,
    source: NodeId | None = A,
    destination: NodeId | None = B,
    namespace: NamespaceId | None = ROOM,
    bytes_per_s: int = 0,
    copy: bool = False,
) -> Wish:
    return Wish(namespace, keys(numbers), source, destination, bytes_per_s, copy=copy)


def begin(made: SmallFabric, wanted: Wish) -> Move:
    return made.core.moving.migrating.begin(wanted, made.now_s)


@pytest.mark.parametrize("old", MoveState)
@pytest.mark.parametrize("new", MoveState)
def test_only_the_table_s_steps_are_taken(old: MoveState, new: MoveState) -> None:
    if new in TRANSITIONS[old]:
        check_step("it", old, new)
    else:
        with pytest.raises(Broken, match=f"from {old.name} to {new.name}"):
            check_step("it", old, new)


def test_the_states_are_those_of_the_protocol() -> None:
    named = {name.removeprefix("MOVE_STATE_") for name in control_pb2.MoveState.keys()}  # noqa: SIM118
    assert named - {"UNSPECIFIED"} == {state.name for state in MoveState}


def test_keys_are_moved_and_the_source_keeps_none() -> None:
    made = fabric()

    move = begin(made, wish(1, 2, 3))
    made.until_ended(move)

    assert succeeded(move)
    assert (move.keys, move.copied, move.dropped) == (3, 3, 3)
    assert [made.holders(number) for number in (0, 1, 2, 3)] == [{"a"}, {"b"}, {"b"}, {"b"}]


def test_a_copy_leaves_the_source_as_it_is() -> None:
    made = fabric()

    move = begin(made, wish(1, copy=True))
    made.until_ended(move)

    assert succeeded(move)
    assert made.holders(1) == {"a", "b"}


def test_a_whole_node_is_moved_to_where_there_is_room() -> None:
    made = fabric()
    made.put("a", range(50), OTHER)
    made.run(1)

    move = begin(made, Wish(None, (), A, None))
    made.until_ended(move)

    assert succeeded(move)
    assert move.copied == move.dropped == 250
    assert not made.nodes[A].held
    assert len(made.nodes[B].held) + len(made.nodes[C].held) == 250


def test_one_namespace_of_a_node_is_moved() -> None:
    made = fabric()
    made.put("a", range(50), OTHER)
    made.run(1)

    move = begin(made, Wish(OTHER, (), A, C))
    made.until_ended(move)

    assert {namespace for namespace, _ in made.nodes[A].held} == {ROOM}
    assert len(made.nodes[C].held) == 50


def test_what_lies_at_the_destination_already_is_only_dropped() -> None:
    made = fabric()
    made.put("b", [1])
    made.run(1)

    move = begin(made, wish(1))
    made.until_ended(move)

    assert succeeded(move)
    assert made.nodes[B].pulled == 0
    assert made.holders(1) == {"b"}


def test_keys_are_found_wherever_they_lie() -> None:
    made = fabric()
    made.put("c", [1000])
    made.run(1)

    move = begin(made, wish(1, 1000, source=None))
    made.until_ended(move)

    assert (made.holders(1), made.holders(1000)) == ({"b"}, {"b"})


def test_a_leased_shard_goes_when_its_lease_ends() -> None:
    made = fabric()
    made.nodes[A].leased[ROOM, key(1)] = made.now_s + 20

    move = begin(made, wish(1))
    made.run(15)
    assert move.state is MoveState.DROPPING
    assert made.holders(1) == {"a", "b"}
    made.until_ended(move)

    assert succeeded(move)
    assert made.holders(1) == {"b"}


def test_a_claimed_shard_stays_and_the_move_says_so() -> None:
    made = fabric()
    made.nodes[A].claimed.add((ROOM, key(1)))

    move = begin(made, wish(1, 2))
    made.until_ended(move)

    assert (move.state, move.failed, move.dropped) == (MoveState.FAILED, 1, 1)
    assert "claimed or leased" in move.notes[0]
    assert made.holders(1) == {"a", "b"}


def test_a_destination_that_dies_is_replaced_and_nothing_is_lost() -> None:
    made = fabric()
    made.delay_s = 3.0

    move = begin(made, Wish(ROOM, (), A, None))
    made.run(0.5)  # nothing is copied yet
    made.kill("b")
    made.until_ended(move)

    assert succeeded(move)
    assert all(made.holders(number) == {"c"} for number in range(200))


def test_a_destination_that_was_asked_for_and_dies_fails_the_move() -> None:
    made = fabric()
    made.delay_s = 3.0

    move = begin(made, wish(*range(200)))
    made.run(1)
    made.kill("b")
    made.until_ended(move)

    assert move.state is MoveState.FAILED
    assert "b went away" in move.notes[0]
    assert all(made.holders(number) == {"a"} for number in range(200))


def test_a_copy_that_dies_before_the_drop_is_made_anew() -> None:
    made = fabric()
    for number in range(200):
        made.nodes[A].leased[ROOM, key(number)] = made.now_s + 25

    move = begin(made, Wish(ROOM, (), A, None))
    made.run(10)
    assert len(made.nodes[B].held) + len(made.nodes[C].held) == 200
    made.kill("b")
    made.until_ended(move)

    assert succeeded(move)
    assert all(made.holders(number) == {"c"} for number in range(200))


@pytest.mark.parametrize("seed", range(12))
def test_a_destination_that_dies_when_its_copies_were_seen_costs_nothing(seed: int) -> None:
    """The source has been told to drop, or is about to be: the manager knows of no death yet."""
    made = fabric(seed)
    made.delay_s = 3.0
    begin(made, wish(*range(64)))
    other = begin(made, Wish(ROOM, keys(range(100, 200)), A, None))
    until_told_to_drop(made)

    made.kill("b")
    made.until_ended(other)
    made.until_quiet()

    assert made.void_drops
    assert all(made.holders(number) for number in range(200))
    assert all(made.holders(number) == {"c"} for number in range(100, 200))


@pytest.mark.parametrize("seed", range(8))
def test_a_replica_s_holder_that_dies_before_a_surplus_one_is_dropped(seed: int) -> None:
    made = fabric(seed)
    made.delay_s = 3.0
    made.put("b", range(64))
    made.run(1)
    begin(made, wish(*range(64)))  # they lie there already
    until_told_to_drop(made)

    made.kill("b")
    made.until_quiet()

    assert made.void_drops
    assert all(made.holders(number) for number in range(200))


def until_told_to_drop(made: SmallFabric) -> None:
    end_s = made.now_s + 60
    while "b" not in {
        holder.node for *_, command in made.nodes[A].todo for holder in command.drop.holders
    }:
        assert made.now_s < end_s
        made.step()


def test_who_has_copies_is_named_to_who_drops_its_own() -> None:
    made = fabric()
    made.delay_s = 100.0
    made.put("b", [1, 2])
    made.put("c", [2])
    made.run(1)

    begin(made, wish(1, 2))
    until_told_to_drop(made)

    named = {
        each: [holder.node for holder in command.drop.holders]
        for *_, command in made.nodes[A].todo
        for each in unpacked(command.drop.keys)
    }
    assert named == {key(1): ["b"], key(2): ["b", "c"]}
    endpoints = made.nodes[A].todo[0][2].drop.holders[0].endpoints
    assert (endpoints.host, endpoints.unix_path) == ("b", "/b")


def test_a_source_that_dies_ends_the_move() -> None:
    made = fabric()
    made.delay_s = 3.0

    move = begin(made, wish(*range(200)))
    made.kill("a")
    made.until_ended(move)

    assert move.vanished == 200 - move.copied


def test_a_move_that_is_cancelled_begins_nothing_more() -> None:
    made = fabric()
    made.delay_s = 5.0
    move = begin(made, wish(*range(200)))

    made.core.moving.mover.cancel(move.number, made.now_s)
    made.run(20)

    assert move.state is MoveState.CANCELLED
    assert all("a" in made.holders(number) for number in range(200))
    assert made.nodes[B].pulled == 0  # the commands had not been taken yet
    made.core.moving.mover.cancel(move.number, made.now_s)  # may be repeated
    with pytest.raises(Refused, match="no move 77"):
        made.core.moving.mover.cancel(77, made.now_s)


def test_a_cancelled_move_ends_the_pulls_that_were_taken() -> None:
    made = fabric()
    made.delay_s = 100.0
    move = begin(made, wish(*range(200)))
    other = begin(made, wish(*range(200), destination=C, copy=True))
    made.run(2)
    pulls = [command.pull.move for *_, command in made.nodes[B].todo if command.HasField("pull")]
    assert set(pulls) == {move.number}

    made.core.moving.mover.cancel(move.number, made.now_s)
    made.run(1)

    told = [command.cancel.move for *_, command in made.nodes[B].todo if command.HasField("cancel")]
    assert told == [move.number]
    assert not any(command.HasField("cancel") for *_, command in made.nodes[C].todo)
    assert other.state is MoveState.COPYING


def test_a_throttled_move_takes_its_time() -> None:
    made = fabric()
    rate = 10 * SHARD_BYTES

    move = begin(made, wish(*range(200), bytes_per_s=rate))
    made.run(10)
    assert 60 <= made.nodes[B].pulled <= 130
    made.until_ended(move)

    assert succeeded(move)
    assert move.ended_s - move.begun_s >= 15
    assert all(0 < each <= rate for each in made.nodes[B].pull_rates)


def test_limits_hold_however_much_is_to_be_moved() -> None:
    made = SmallFabric()
    for number in range(4):
        made.add(f"n{number}", 20_000)
    made.put("n0", range(3000))
    made.delay_s = 4.0
    made.run(1)

    move = begin(made, Wish(ROOM, (), NodeId("n0"), None))
    made.until_ended(move)

    assert succeeded(move)
    assert 0 < made.most_in_flight <= min(PER_DESTINATION, 3 * PER_LINK)


def test_two_moves_of_one_key_take_turns() -> None:
    made = fabric()

    first = begin(made, wish(1, 2, destination=B))
    second = begin(made, wish(2, 3, source=None, destination=C))
    made.until_ended(first)
    made.until_ended(second)

    assert [made.holders(number) for number in (1, 2, 3)] == [{"b"}, {"c"}, {"c"}]


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (wish(1, source=A, destination=A), "cannot move anything to itself"),
        (wish(1, destination=NodeId("x")), "x is no node that is alive"),
        (wish(1, source=NodeId("x")), "x is no node that is alive"),
        (wish(4711), "none of these 1 keys"),
        (wish(source=None), "name keys or a node"),
        (Wish(None, [key(1)], A, B), "without their namespace"),
    ],
)
def test_what_cannot_be_moved_is_refused(wanted: Wish, why: str) -> None:
    with pytest.raises(Refused, match=why):
        begin(fabric(), wanted)


def test_moves_are_limited_in_number() -> None:
    made = fabric()
    made.delay_s = 100.0
    for number in range(MAX_MOVES):
        begin(made, wish(number))

    with pytest.raises(Retry, match=f"{MAX_MOVES} moves"):
        begin(made, wish(100))


def test_a_restarted_manager_forgets_moves_and_harms_nothing() -> None:
    made = fabric()
    made.delay_s = 2.0
    begin(made, wish(*range(200)))
    made.run(2)

    made.restart_manager()
    made.run(20)

    assert made.moves() == []
    assert all(made.holders(number) for number in range(200))


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_moves_end_and_no_copy_is_dropped_wrongly(seed: int) -> None:
    made = SmallFabric(seed, lost=0.15, doubled=0.15)
    made.delay_s = made.chance.choice([0.3, 2.0, 8.0])
    for number in range(5):
        made.add(f"n{number}")
    everything: set[Key] = set()
    for number in range(300):
        made.put(f"n{made.chance.randrange(5)}", [number])
        everything.add(key(number))
    made.run(2)
    moves: list[Move] = []

    for _ in range(6):
        source, destination = made.chance.sample(sorted(made.nodes), 2)
        try:
            moves.append(
                begin(made, Wish(ROOM, (), source, made.chance.choice([destination, None])))
            )
        except Refused:
            continue  # it is silent just now
        fate = made.chance.randrange(5)
        if fate == 0:
            made.restart_manager()
        elif fate == 1 and len(made.living()) > 3:
            made.kill(made.chance.choice(made.living()).name)
        elif fate == 2:
            made.chance.choice(made.living()).cut_off = True
        made.run(made.chance.randrange(1, 20))
        for node in made.nodes.values():
            node.cut_off = False
    made.until_quiet()

    assert made.moves() == []  # all have ended, or were forgotten
    dead = any(not node.alive for node in made.nodes.values())
    if not dead:
        assert all(made.holders(number) for number in range(300))
