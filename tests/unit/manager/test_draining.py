"""Nodes are emptied while they serve: everything finds a place, or was cold; drains end."""

from __future__ import annotations

import pytest
from tests.unit.manager.small_fabric import OTHER, ROOM, SHARD_BYTES, SmallFabric, key

from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import NodeId

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def fabric(seed: int = 0, capacity_shards: int = 1000, **chaos: float) -> SmallFabric:
    """Nodes a, b and c; a holds shards 0 to 199 and some of another namespace."""
    made = SmallFabric(seed, **chaos)
    for name in "abc":
        made.add(name, capacity_shards)
    made.put("a", range(200))
    made.put("a", range(20), OTHER)
    made.run(1)
    return made


def test_a_node_is_emptied_and_then_may_be_deleted() -> None:
    made = fabric()

    made.drain("a")
    made.step()
    assert made.drained("a").waiting == "a is told to take nothing in"
    made.until_empty("a")

    told = made.drained("a")
    assert (told.empty, told.left_shards, told.left_bytes, told.waiting) == (True, 0, 0, "")
    assert told.moved_shards == 220
    assert all(made.holders(number) for number in range(200))
    assert all(made.holders(number, OTHER) for number in range(20))
    assert made.nodes[A].draining
    assert not made.nodes[B].draining


def test_nothing_is_moved_to_a_node_that_is_emptied() -> None:
    made = fabric()
    made.drain("b")
    made.drain("a")
    made.until_empty("a")

    assert made.nodes[B].pulled == 0
    assert len(made.nodes[C].held) == 220


def test_what_has_replicas_enough_is_only_dropped() -> None:
    made = fabric()
    made.put("b", range(200))
    made.put("c", range(20), OTHER)
    made.run(1)

    made.drain("a")
    made.until_empty("a")

    assert made.nodes[B].pulled == made.nodes[C].pulled == 0


def test_a_namespace_keeps_its_replica_count() -> None:
    made = fabric()
    made.add("d")
    made.put("b", range(200))
    made.set_policy(2)
    made.run(1)

    made.drain("a")
    made.until_empty("a")

    assert all(len(made.holders(number)) == 2 for number in range(200))


def test_a_drop_that_was_not_taken_yet_is_called_back_when_the_other_copy_is_lost() -> None:
    made = fabric()
    made.put("b", range(200))
    made.run(1)
    made.nodes[A].cut_off = True  # for a moment: a's commands wait
    made.drain("a")
    made.run(3)
    assert made.core.cluster.orders.waiting(A)
    made.nodes[A].next_beat_s = made.now_s + 10
    made.kill("b")
    for _ in range(24):  # until b is known to be lost
        made.core.cluster.members[A].heard_s = made.now_s  # not silent for so long as b
        made.step()
    assert not made.holders(1) - {"a"}
    made.nodes[A].cut_off = False
    made.nodes[A].next_beat_s = 0.0
    made.run(1)
    assert all("a" in made.holders(number) for number in range(200))
    made.until_empty("a")

    assert all(made.holders(number) == {"c"} for number in range(200))


def test_a_leased_shard_is_waited_for() -> None:
    made = fabric()
    made.nodes[A].leased[ROOM, key(1)] = made.now_s + 60

    made.drain("a")
    made.run(50)
    assert made.drained("a").waiting == "1 shards, 1 leases"
    assert made.drained("a").left_bytes == SHARD_BYTES
    made.until_empty("a")

    assert made.holders(1) in ({"b"}, {"c"})


def test_what_somebody_needs_is_waited_for_however_long() -> None:
    made = fabric()
    made.nodes[A].claimed.add((ROOM, key(1)))

    made.drain("a")
    made.run(400)
    assert made.drained("a").waiting == "1 shards"
    assert "a" in made.holders(1)
    made.nodes[A].claimed.clear()
    made.until_empty("a")


def test_cold_cache_without_room_anywhere_is_dropped() -> None:
    made = SmallFabric()
    made.add("a", 200)
    made.add("b", 50)
    made.put("a", range(100))
    made.put("b", range(1000, 1030))
    made.run(1)

    made.drain("a")
    made.until_empty("a")

    assert len(made.given_up) == 80
    assert len(made.nodes[B].held) == 50
    assert all(made.holders(number) == {"b"} for number in range(1000, 1030))


def test_what_is_claimed_pinned_or_read_is_not_dropped_for_want_of_room() -> None:
    made = SmallFabric()
    made.add("a", 200)
    made.add("b", 50)
    made.put("a", range(100))
    made.put("b", range(1000, 1050))
    made.run(1)
    made.pin([1])
    made.nodes[A].heat = {(ROOM, key(2)): 50}
    made.nodes[A].claimed.add((ROOM, key(3)))
    made.run(1)

    made.drain("a")
    made.run(60)
    assert made.holders(3) >= {"a"}
    made.nodes[A].claimed.clear()
    made.until_empty("a")

    assert made.holders(1) == made.holders(2) == {"b"}  # colder cache went for them
    assert {(ROOM, key(1)), (ROOM, key(2))}.isdisjoint(made.given_up)


def test_a_pinned_shard_is_pinned_where_it_goes_before_it_is_unpinned_here() -> None:
    made = fabric()
    made.pin([1, 2])
    made.run(1)
    assert (ROOM, key(1)) in made.nodes[A].pinned

    made.drain("a")
    made.until_empty("a")

    for number in (1, 2):
        (holder,) = made.holders(number)
        assert (ROOM, key(number)) in made.nodes[NodeId(holder)].pinned


def test_sequences_are_lent_out_first() -> None:
    made = fabric()
    made.nodes[A].sequences = {7: 10 * SHARD_BYTES, 8: 4 * SHARD_BYTES}
    made.run(1)

    made.drain("a")
    made.run(2)
    assert made.nodes[A].sequences == {7: 0, 8: 0}
    made.run(60)
    assert made.drained("a").waiting == "2 open sequences"
    made.nodes[A].sequences.clear()
    made.until_empty("a")


def test_loans_are_recalled_and_waited_for() -> None:
    made = fabric()
    ledger = made.core.cluster.ledger
    loans = control_pb2.Loans(
        loan=[3],
        debtor=["b"],
        debtor_incarnation=[1],
        creditor=["a"],
        creditor_incarnation=[1],
        state=[control_pb2.LOAN_STATE_HELD],
        size_bytes=[5 * SHARD_BYTES],
    )
    ledger.report(A, 1, loans)

    made.drain("a")
    made.step()
    recalls = [
        command.recall
        for command in made.core.cluster.orders.take(A)
        if command.WhichOneof("what") == "recall"
    ]
    assert [(each.debtor, each.endpoints.unix_path) for each in recalls] == [("b", "/b")]
    made.run(60)
    assert made.drained("a").waiting == f"{5 * SHARD_BYTES:,} bytes held for other nodes"
    assert made.drained("a").lent_bytes == 5 * SHARD_BYTES
    ledger.report(A, 1, control_pb2.Loans())
    made.until_empty("a")


def test_a_drain_that_is_called_off_leaves_the_rest() -> None:
    made = fabric()
    made.drain("a", bytes_per_s=10 * SHARD_BYTES)
    made.run(5)

    made.core.moving.draining.cancel(A, made.now_s)
    made.run(30)

    assert not made.nodes[A].draining
    assert 100 < len(made.nodes[A].held) < 220
    assert made.moves() == []


def test_a_throttled_drain_keeps_its_rate() -> None:
    made = fabric()
    made.drain("a", bytes_per_s=10 * SHARD_BYTES)
    made.run(10)

    assert 50 <= made.nodes[B].pulled + made.nodes[C].pulled <= 140
    made.until_empty("a")


def test_a_restarted_manager_goes_on() -> None:
    made = fabric()
    made.drain("a", bytes_per_s=20 * SHARD_BYTES)
    made.run(4)

    made.restart_manager()
    made.until_empty("a")

    assert all(made.holders(number) for number in range(200))


def test_a_silent_node_is_not_said_to_be_empty() -> None:
    made = fabric()
    made.drain("a")
    made.until_empty("a")
    made.nodes[A].cut_off = True
    made.run(10)

    assert not made.drained("a").empty
    assert "was not heard for" in made.drained("a").waiting


def test_a_node_that_comes_back_with_its_shards_is_emptied_on() -> None:
    made = fabric()
    made.drain("a", bytes_per_s=5 * SHARD_BYTES)
    made.run(3)
    made.start_anew("a", survivors=list(made.nodes[A].held))

    made.until_empty("a")

    assert all(made.holders(number) for number in range(200))


def test_a_node_that_comes_back_empty_is_another_one_and_serves() -> None:
    made = fabric()
    made.drain("a")
    made.until_empty("a")
    made.start_anew("a")
    made.run(3)

    assert not made.nodes[A].draining
    assert made.core.moving.draining.changed == [A]
    assert A not in made.core.moving.rules.drains


def test_what_comes_meanwhile_is_moved_too() -> None:
    made = fabric()
    made.drain("a", bytes_per_s=50 * SHARD_BYTES)
    for number in range(300, 320):
        made.put("a", [number])  # of a writer that had reserved before
        made.run(0.5)
    made.until_empty("a")

    assert all(made.holders(number) for number in range(300, 320))


def trouble(made: SmallFabric, spare: list[NodeId]) -> None:
    """Something that the seed chooses; nodes to be spared are not killed."""
    fate = made.chance.randrange(5)
    others = [node for node in made.living() if node.name not in spare]
    if fate == 0:
        made.restart_manager()
    elif fate == 1 and len(others) > 2:
        made.kill(made.chance.choice(others).name)
    elif fate == 2:
        made.chance.choice(made.living()).cut_off = True
    elif fate == 3:
        number = made.chance.randrange(250)
        for holder in made.holders(number):
            made.nodes[NodeId(holder)].leased[ROOM, key(number)] = made.now_s + 40


@pytest.mark.parametrize("seed", [*range(10), 1086, 5269])  # the last two found faults once
def test_whatever_happens_drains_end_and_what_lives_somewhere_stays(seed: int) -> None:
    made = SmallFabric(seed, lost=0.15, doubled=0.15)
    made.delay_s = made.chance.choice([0.3, 2.0, 6.0])
    for number in range(5):
        made.add(f"n{number}", zone=f"z{number % 3}")
    for number in range(250):
        for name in made.chance.sample(sorted(made.nodes), made.chance.choice([1, 1, 2])):
            made.put(name, [number])
    made.set_policy(made.chance.choice([0, 2]))
    made.run(2)
    drained = made.chance.sample(sorted(made.nodes), 2)

    for name in drained:
        made.drain(name, made.chance.choice([0, 30 * SHARD_BYTES]))
        for _ in range(2):
            trouble(made, drained)
            made.run(made.chance.randrange(1, 15))
            for node in made.nodes.values():
                node.cut_off = False
    for name in drained:
        made.until_empty(name)

    if len(made.living()) == 5:
        assert all(made.holders(number) for number in range(250))
    assert not made.given_up
