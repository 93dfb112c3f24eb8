"""Replica counts, losses, hot shards and nodes that join: what is made, where, and when it goes."""

from __future__ import annotations

import pytest
from tests.unit.manager.small_fabric import OTHER, ROOM, SHARD_BYTES, SmallFabric, key

from kvfabric.types import NodeId


def fabric(seed: int = 0, capacity_shards: int = 1000, **chaos: float) -> SmallFabric:
    """Six nodes in three zones, two hosts in each: n0 and n1 in z0, n2 and n3 in z1, ..."""
    made = SmallFabric(seed, **chaos)
    for number in range(6):
        made.add(f"n{number}", capacity_shards, zone=f"z{number // 2}")
    made.run(1)
    return made


def zones(made: SmallFabric, number: int) -> list[str]:
    return sorted(made.nodes[NodeId(name)].labels["zone"] for name in made.holders(number))


def test_new_shards_get_their_replicas_in_other_zones() -> None:
    made = fabric()
    made.set_policy(3)
    made.put("n0", range(100))
    made.until_quiet()

    assert all(zones(made, number) == ["z0", "z1", "z2"] for number in range(100))


def test_only_namespaces_whose_policy_says_so_get_replicas() -> None:
    made = fabric()
    made.set_policy(2, room=OTHER)
    made.put("n0", range(10))
    made.put("n0", range(10), OTHER)
    made.until_quiet()

    assert all(made.holders(number) == {"n0"} for number in range(10))
    assert all(len(made.holders(number, OTHER)) == 2 for number in range(10))


def test_a_default_is_for_all_that_have_no_policy_of_their_own() -> None:
    made = fabric()
    made.set_policy(2, room=None)
    made.set_policy(1, room=OTHER)
    made.put("n0", range(10))
    made.put("n0", range(10), OTHER)
    made.until_quiet()

    assert all(len(made.holders(number)) == 2 for number in range(10))
    assert all(len(made.holders(number, OTHER)) == 1 for number in range(10))


def test_a_policy_that_comes_later_is_for_what_is_there_already() -> None:
    made = fabric()
    made.put("n0", range(200))
    made.run(2)

    made.set_policy(2)
    made.until_quiet()

    assert all(len(made.holders(number)) == 2 for number in range(200))


def test_what_a_lost_node_held_gets_its_replicas_again() -> None:
    made = fabric()
    made.set_policy(2)
    made.put("n0", range(200))
    made.until_quiet()

    made.kill("n0")
    made.run(8)
    made.until_quiet()

    assert all(len(set(zones(made, number))) == 2 for number in range(200))


def test_no_more_replicas_are_wanted_than_there_are_nodes() -> None:
    made = SmallFabric()
    made.add("a")
    made.add("b")
    made.set_policy(5)
    made.put("a", range(10))
    made.until_quiet()

    assert all(made.holders(number) == {"a", "b"} for number in range(10))


def test_replicas_beyond_the_count_are_cache_and_stay() -> None:
    made = fabric()
    made.put("n0", range(10))
    made.put("n1", range(10))
    made.put("n2", range(10))
    made.set_policy(2)
    made.until_quiet()

    assert all(len(made.holders(number)) == 3 for number in range(10))


def test_replicas_that_full_nodes_evict_are_not_made_again_and_again() -> None:
    made = SmallFabric()
    made.add("a", 100)
    made.add("b", 40)
    made.put("a", range(80))
    made.set_policy(2)
    made.run(700)  # the alarm of the new policy is over
    pulled = made.nodes[NodeId("b")].pulled
    made.run(120)

    assert len(made.nodes[NodeId("b")].held) == 40
    assert made.nodes[NodeId("b")].pulled == pulled
    assert len(made.nodes[NodeId("a")].held) == 80  # nothing was evicted where the only copies are


def test_a_hot_shard_spreads_to_who_asks_and_the_copy_goes_when_it_cools() -> None:
    made = fabric()
    made.put("n0", range(10))
    made.set_policy(1, hot_replicas=1)
    made.run(2)

    for _ in range(120):
        made.nodes[NodeId("n0")].heat = {(ROOM, key(1)): 10}
        made.core.locate(ROOM, [key(1)], prefix=False, asker=NodeId("n4"))
        made.run(0.5)
    assert made.holders(1) == {"n0", "n4"}
    assert made.holders(2) == {"n0"}
    made.run(60)
    assert made.holders(1) == {"n0", "n4"}  # not at once: it may be read again
    made.run(300)

    assert made.holders(1) == {"n0"}


def test_a_hot_shard_of_readers_unknown_spreads_to_another_zone() -> None:
    made = fabric()
    made.put("n0", [1])
    made.set_policy(1, hot_replicas=2)
    made.run(2)
    for _ in range(240):
        made.nodes[NodeId("n0")].heat = {(ROOM, key(1)): 20}
        made.run(0.5)

    assert zones(made, 1) == ["z0", "z1", "z2"]


def test_an_extra_replica_without_which_there_were_too_few_zones_stays() -> None:
    made = fabric()
    made.set_policy(2, hot_replicas=1)
    made.put("n0", [1])
    made.put("n2", [1])
    for _ in range(120):
        made.nodes[NodeId("n0")].heat = {(ROOM, key(1)): 20}
        made.core.locate(ROOM, [key(1)], prefix=False, asker=NodeId("n4"))
        made.run(0.5)
    assert made.holders(1) == {"n0", "n2", "n4"}

    made.kill("n2")
    made.put("n1", [1])  # cache: of two replicas in one zone and an extra one
    made.run(400)

    assert made.holders(1) == {"n0", "n1", "n4"}
    moves = made.core.moving.mover.moves()
    assert not any(move.dropped for move in moves)


def test_without_a_policy_for_it_nothing_is_spread() -> None:
    made = fabric()
    made.put("n0", [1])
    for _ in range(60):
        made.nodes[NodeId("n0")].heat = {(ROOM, key(1)): 100}
        made.run(0.5)

    assert made.holders(1) == {"n0"}


# Counts of single shards


def test_a_shard_s_own_count_is_reached_without_any_policy() -> None:
    made = fabric()
    made.put("n0", range(10))
    made.run(2)

    made.set_replicas([1, 2, 77], 3)
    made.until_quiet()
    made.put("n1", [77])
    made.until_quiet()

    assert all(zones(made, number) == ["z0", "z1", "z2"] for number in (1, 2, 77))
    assert all(made.holders(number) == {"n0"} for number in (0, *range(3, 10)))


def test_own_counts_are_for_more_and_for_fewer_than_the_policy_s() -> None:
    made = fabric()
    made.set_policy(2)
    made.set_replicas([1], 1)
    made.set_replicas([2], 3)
    made.put("n0", range(10))
    made.until_quiet()

    assert [len(made.holders(number)) for number in range(4)] == [2, 1, 3, 2]
    made.kill("n0")
    made.run(8)
    made.until_quiet()
    assert [len(made.holders(number)) for number in range(4)] == [2, 0, 3, 2]


def test_what_a_lowered_count_leaves_over_is_taken_away_and_the_rest_stays_spread() -> None:
    made = fabric()
    made.set_policy(3)
    made.put("n0", range(100))
    made.until_quiet()

    made.set_replicas(range(50), 2)
    made.set_replicas(range(10), 1)
    made.until_quiet()

    assert [len(made.holders(number)) for number in (0, 9, 10, 49, 50)] == [1, 1, 2, 2, 3]
    assert all(len(set(zones(made, number))) == 2 for number in range(10, 50))
    (spread,) = [move for move in made.core.moving.mover.moves() if move.kind == "spread"]
    assert (spread.dropped, spread.failed) == (60, 0)


def test_a_count_that_is_taken_back_leaves_what_the_policy_wants() -> None:
    made = fabric()
    made.put("n0", range(10))
    made.set_replicas(range(10), 3)
    made.until_quiet()

    made.set_replicas(range(10), 0)
    made.until_quiet()

    assert all(len(made.holders(number)) == 1 for number in range(10))


def test_a_count_that_is_lowered_while_copies_are_under_way_is_kept_all_the_same() -> None:
    made = fabric()
    made.delay_s = 6.0
    made.put("n0", range(10))
    made.run(2)
    made.set_replicas(range(10), 3)
    made.run(1)
    made.set_replicas(range(10), 1)
    made.until_quiet()

    assert all(len(made.holders(number)) == 1 for number in range(10))


def test_cache_beyond_a_lowered_count_stays_and_pinned_replicas_too() -> None:
    made = fabric()
    made.set_policy(2)
    for name in ("n0", "n1", "n2"):
        made.put(name, [1])
    for name in ("n0", "n2"):
        made.put(name, [2])
    made.pin([2])
    made.until_quiet()

    made.set_replicas([1, 2], 1)
    made.until_quiet()

    assert len(made.holders(1)) == 2  # one of the two that the policy wanted is gone
    assert made.holders(2) == {"n0", "n2"}


def test_a_lowered_count_waits_until_a_hot_shard_has_cooled() -> None:
    made = fabric()
    made.set_policy(2, hot_replicas=1)
    made.put("n0", [1])
    made.until_quiet()

    made.set_replicas([1], 1)
    for _ in range(240):
        made.nodes[NodeId("n0")].heat = {(ROOM, key(1)): 4}
        made.run(0.5)
    assert len(made.holders(1)) == 2
    made.run(300)

    assert len(made.holders(1)) == 1


def test_a_drain_leaves_every_shard_its_own_count() -> None:
    made = fabric()
    made.set_policy(2)
    made.set_replicas([1], 1)
    made.set_replicas([2], 3)
    made.put("n0", range(4))
    made.until_quiet()

    made.drain("n0")
    made.until_empty("n0")
    made.run(20)

    assert [len(made.holders(number)) for number in range(4)] == [2, 1, 3, 2]


def test_a_restarted_manager_keeps_own_counts() -> None:
    made = fabric()
    made.put("n0", range(10))
    made.set_replicas(range(5), 2)
    made.restart_manager()
    made.until_quiet()

    assert [len(made.holders(number)) for number in (0, 4, 5)] == [2, 2, 1]


def test_explain_tells_how_many_replicas_are_wanted_and_since_when() -> None:
    made = fabric()
    made.set_policy(2)
    made.put("n0", [1])
    made.run(1)
    made.set_replicas([1], 3)
    made.run(10)

    found = made.core.explain(ROOM, key(1), made.now_s)

    assert found.replicas == (3,)
    assert [(each.node, each.why) for each in found.events if each.what == "replicas"] == [
        ("", "3 are wanted")
    ]


# Nodes that join


def test_a_node_that_joins_takes_what_a_full_one_would_evict() -> None:
    made = SmallFabric()
    made.add("a", 2000)
    made.add("b", 2000)
    made.put("a", range(1900))
    made.put("b", range(3000, 4300))
    made.run(1)
    made.nodes[NodeId("a")].heat = {(ROOM, key(number)): 100 for number in range(50)}
    joined = made.add("c", 2000)
    made.run(7)
    assert 0 < joined.pulled < 200  # slowly
    made.until_quiet()

    kept = made.nodes[NodeId("a")].held
    assert 0.7 * 2000 <= len(kept) <= 0.8 * 2000  # and no more than that
    assert all((ROOM, key(number)) in kept for number in range(50))  # what is read stays
    assert all(made.holders(number) for number in range(1900))
    assert all(rate > 0 for rate in joined.pull_rates)


def test_a_node_that_joins_gets_nothing_where_no_node_is_full() -> None:
    made = SmallFabric()
    made.add("a", 300)
    made.put("a", range(200))
    made.run(1)
    joined = made.add("b", 300)
    made.run(60)

    assert joined.pulled == 0


@pytest.mark.parametrize("seed", range(10))
def test_whatever_happens_counts_are_reached_again(seed: int) -> None:
    made = SmallFabric(seed, lost=0.15, doubled=0.15)
    made.delay_s = made.chance.choice([0.3, 2.0, 6.0])
    for number in range(6):
        made.add(f"n{number}", zone=f"z{number // 2}")
    made.set_policy(2)
    made.set_replicas(range(20), 3)
    for number in range(200):
        made.put(f"n{made.chance.randrange(6)}", [number])
    made.run(2)
    made.until_quiet()

    for _ in range(3):  # one loss at a time, each mended before the next
        fate = made.chance.randrange(4)
        if fate == 0 and len(made.living()) > 4:
            made.kill(made.chance.choice(made.living()).name)
        elif fate == 1:
            made.restart_manager()
        elif fate == 2:
            made.start_anew(made.chance.choice(made.living()).name)
        else:
            made.chance.choice(made.living()).cut_off = True
        made.run(8)
        for node in made.nodes.values():
            node.cut_off = False
        made.run(2)
        made.until_quiet()

    assert all(len(made.holders(number)) >= 2 for number in range(200))
    assert all(len(set(zones(made, number))) >= 2 for number in range(200))
    assert all(len(made.holders(number)) >= 3 for number in range(20))
    assert made.nodes[NodeId("n0")].pull_rates.count(0) == len(made.nodes[NodeId("n0")].pull_rates)


def test_sizes_are_what_nodes_say_on_average() -> None:
    made = fabric()
    made.set_policy(2)
    made.put("n0", range(10))
    made.until_quiet()

    (repair,) = [move for move in made.core.moving.mover.moves() if move.copied]
    assert repair.size_bytes == 10 * SHARD_BYTES
