"""Blocks that lie at other nodes are claimed there, in place: whose loan has ended, and those
that a sequence begins with."""

from __future__ import annotations

from random import Random

import pytest

from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import Key
from kvfabric_nodes.lending.borrowing import RECLAIM_S
from kvfabric_nodes.lending.claiming import ASKED, WANTED_KEYS
from kvfabric_nodes.lending.instructions import AskReplicas
from kvfabric_nodes.lending.room import RoomState
from kvfabric_nodes.lending.seeking import LOAN_KEYS

from .conftest import SHARD_BYTES, key
from .lenders import SLOTS, Node, Town, Weather

SOON_S = 10.0


def cache(node: Node, keys: list[Key]) -> list[Key]:
    """These lie at the node, and nobody there needs them."""
    assert all(node.put(each, need=False) for each in keys)
    node.town.report(node.name)
    return keys


def lend_out(town: Town, count: int) -> list[Key]:
    """Blocks of a's sequence, all at b."""
    keys = [key(number) for number in range(count)]
    assert all(town["a"].put(each) for each in keys)
    what = control_pb2.Command.LendOut(
        sequence=7,
        size_bytes=count * SHARD_BYTES,
        creditor="b",
        endpoints=types_pb2.Endpoints(host="b"),
    )
    town["a"].lending.command(control_pb2.Command(id=1, lend_out=what), 1, town.now_s)
    town["a"].carry_out()
    town.until(lambda: places(town["a"], keys) == {"b"})
    return keys


def places(node: Node, keys: list[Key]) -> set[str | None]:
    return {node.lending.whereabouts(node.namespace, each) for each in keys}


def die(town: Town, name: str) -> None:
    """The node is gone for good, and the manager has noticed."""
    town.weather.cut.update(frozenset((name, other)) for other in town.nodes if other != name)
    gone = town.restart(name)
    gone.alive = False
    town.report(name)


def fill_with_cache(node: Node) -> None:
    """More than fits, so that all that may be evicted is."""
    for number in range(2 * SLOTS):
        node.put(key(10_000 + number), need=False)


@pytest.fixture
def town() -> Town:
    return Town(["a", "b", "c"], cap_bytes=SLOTS * SHARD_BYTES, loan_s=6.0)


# A loan has ended ---------------------------------------------------------------------------


def test_what_a_dead_creditor_had_is_claimed_where_a_replica_is(town: Town) -> None:
    a, c = town["a"], town["c"]
    keys = lend_out(town, 6)
    cache(c, keys)

    die(town, "b")
    town.run(town.terms.loan_s + SOON_S)
    fill_with_cache(c)

    assert places(a, keys) == {"c"}
    assert all(c.shard(each) for each in keys)
    assert not town.missing()
    assert c.lending.lent_bytes == len(keys) * SHARD_BYTES
    town.run(town.terms.loan_s)
    assert a.lending.borrowed_bytes == len(keys) * SHARD_BYTES
    assert "lost" not in a.told(keys[0])
    assert a.told(keys[0])[-1] == "lent"


def test_what_a_creditor_that_starts_anew_has_not_is_claimed_elsewhere(town: Town) -> None:
    a, b, c = town["a"], town["b"], town["c"]
    keys = lend_out(town, 6)
    cache(c, keys[:3])
    b = town.restart("b")
    cache(b, keys[3:])

    town.run(town.terms.loan_s + SOON_S)

    assert places(a, keys[:3]) == {"c"}
    assert places(a, keys[3:]) == {"b"}
    town.check_balance()


def test_a_block_whose_loan_and_home_copy_are_gone_is_looked_for_everywhere(town: Town) -> None:
    a, c = town["a"], town["c"]
    (one,) = lend_out(town, 1)
    assert a.put(one)
    town.run(SOON_S)
    cache(c, [one])
    shard = a.shard(one)
    assert shard is not None

    a.core.drop(shard, "damaged", "by a test", town.now_s)
    town.run(SOON_S)

    assert places(a, [one]) == {"c"}


def test_what_is_nowhere_stays_missing_and_is_said_to_be_lost(town: Town) -> None:
    a = town["a"]
    keys = lend_out(town, 4)

    die(town, "b")
    town.run(town.terms.loan_s + 2 * RECLAIM_S + SOON_S)

    assert places(a, keys) == {None}
    assert town.missing()["a"] == keys
    assert a.told(keys[0])[-1] == "lost"
    assert not a.loans()
    assert a.lending.due_s() == float("inf")


def test_what_came_home_or_is_needed_no_more_is_not_claimed(town: Town) -> None:
    a, c = town["a"], town["c"]
    keys = lend_out(town, 4)
    cache(c, keys)
    die(town, "b")

    assert a.put(keys[0])
    a.forget(keys[1])
    town.run(town.terms.loan_s + SOON_S)

    assert places(a, keys[:2]) == {None}
    assert places(a, keys[2:]) == {"c"}
    assert c.lending.lent_bytes == 2 * SHARD_BYTES


def test_it_is_looked_for_again_while_the_manager_is_away(town: Town) -> None:
    a = town["a"]
    keys = lend_out(town, 4)
    cache(town["c"], keys)
    die(town, "b")
    town.weather.manager = False
    town.run(town.terms.loan_s + RECLAIM_S / 2)
    assert town.missing()

    town.weather.manager = True
    town.run(SOON_S)

    assert places(a, keys) == {"c"}


@pytest.mark.parametrize("seed", range(30))
def test_whoever_dies_what_has_a_replica_is_claimed_again(seed: int) -> None:
    random = Random(seed)
    weather = Weather(
        loss=random.choice([0.0, 0.1]),
        twice=random.choice([0.0, 0.2]),
        delay_s=random.choice([0.01, 0.5]),
    )
    town = Town(["a", "b", "c", "d"], seed, weather, cap_bytes=SLOTS * SHARD_BYTES, loan_s=12.0)
    a = town["a"]
    keys = [key(number) for number in range(SLOTS + 8)]
    assert all(a.grow(each) for each in keys)
    town.run(SOON_S)
    away = [each for each in keys if a.shard(each) is None]
    for each in away:
        holder = a.lending.whereabouts(a.namespace, each)
        spare = random.choice([name for name in ("b", "c", "d") if name != holder])
        assert town[spare].put(each, need=False)

    for name in random.sample(["b", "c", "d"], 1):
        die(town, name)
        town.run(random.choice([1.0, 20.0]))
    town.run(town.terms.loan_s + RECLAIM_S)
    for name in ("b", "c", "d"):
        if town[name].alive:
            fill_with_cache(town[name])
    town.check()

    assert not town.missing()
    for each in keys:
        a.forget(each)
    town.run(3 * town.terms.loan_s)
    assert not any(node.loans() for node in town.everybody() if node.alive)


# A sequence begins --------------------------------------------------------------------------


def test_blocks_that_a_sequence_begins_with_are_kept_where_they_are(town: Town) -> None:
    a, b, c = town["a"], town["b"], town["c"]
    at_b = cache(b, [key(number) for number in range(5)])
    at_c = cache(c, [key(number) for number in range(5, 8)])
    at_home = [key(8)]
    assert a.put(at_home[0])

    a.begin([*at_b, *at_c, *at_home])
    town.run(SOON_S)
    fill_with_cache(b)
    fill_with_cache(c)

    assert places(a, at_b) == {"b"}
    assert places(a, at_c) == {"c"}
    assert places(a, at_home) == {None}
    assert not town.missing()
    assert a.lending.borrowed_bytes == 8 * SHARD_BYTES
    assert all(loan.in_place for node in town.everybody() for loan in node.loans())
    town.run(3 * town.terms.loan_s)
    town.check_balance()


def test_what_it_needs_no_more_is_cache_again_where_it_was(town: Town) -> None:
    a, b = town["a"], town["b"]
    keys = cache(b, [key(number) for number in range(4)])
    a.begin(keys)
    town.run(SOON_S)

    assert a.put(keys[0])  # it comes home by itself
    for each in keys[1:]:
        a.forget(each)
    town.run(SOON_S)

    assert not a.loans()
    assert not b.loans()
    assert all(b.shard(each) for each in keys)
    assert not any(b.core.shards.claims(b.namespace, each) for each in keys)


def test_a_creditor_at_its_cap_keeps_the_rest_as_cache(town: Town) -> None:
    town = Town(["a", "b"], cap_bytes=3 * SHARD_BYTES)
    a, b = town["a"], town["b"]
    keys = cache(b, [key(number) for number in range(5)])

    a.begin(keys)
    town.run(RECLAIM_S + SOON_S)

    assert places(a, keys[:3]) == {"b"}
    assert places(a, keys[3:]) == {None}
    assert all(b.shard(each) for each in keys)
    assert a.told(keys[4])[-1] == "not claimed"
    assert a.lending.due_s() > town.now_s
    town.check_balance()


def test_a_cap_that_is_free_again_in_time_is_used(town: Town) -> None:
    town = Town(["a", "b", "c"], cap_bytes=3 * SHARD_BYTES)
    keys = cache(town["b"], [key(number) for number in range(4)])
    town["c"].begin(keys[:3])
    town.run(SOON_S)
    town["a"].begin(keys[3:])
    town.run(SOON_S)
    assert places(town["a"], keys[3:]) == {None}

    town["c"].forget(keys[0])
    town.run(SOON_S)

    assert places(town["a"], keys[3:]) == {"b"}


def test_who_refuses_is_passed_over_for_another_replica(town: Town) -> None:
    a, b, c = town["a"], town["b"], town["c"]
    keys = [key(number) for number in range(4)]
    cache(b, keys)
    cache(c, keys)
    b.core.draining = True

    a.begin(keys)
    town.run(SOON_S)

    assert places(a, keys) == {"c"}


def test_who_does_not_answer_is_passed_over_for_another_replica(town: Town) -> None:
    a = town["a"]
    keys = [key(number) for number in range(4)]
    cache(town["b"], keys)
    cache(town["c"], keys)
    town.weather.cut.add(frozenset("ab"))

    a.begin(keys)
    town.run(SOON_S)

    assert places(a, keys) == {"c"}
    town.run(RECLAIM_S)
    town.check_balance()


def test_a_shard_of_another_size_is_not_claimed(town: Town) -> None:
    a, b = town["a"], town["b"]
    (one,) = cache(b, [key(1)])
    a.need(one)

    a.lending.claim(a.namespace, "a", 1, SHARD_BYTES // 4, [one], town.now_s)
    a.carry_out()
    town.run(SOON_S)

    assert places(a, [one]) == {None}
    assert not b.loans()


def test_many_are_asked_for_a_few_at_a_time(town: Town) -> None:
    a = town["a"]
    keys = [key(number) for number in range(100 * LOAN_KEYS)]
    for each in keys:
        a.need(each)

    a.lending.claim(a.namespace, "a", 1, SHARD_BYTES, keys, town.now_s)
    asked: dict[Key, None] = {}
    while wanted := a.lending.take():
        assert len(wanted) <= ASKED
        for question in wanted:
            assert isinstance(question, AskReplicas)
            assert len(question.keys) <= LOAN_KEYS
            asked.update(dict.fromkeys(question.keys))
        for question in wanted:
            assert isinstance(question, AskReplicas)
            nowhere: list[dict[str, types_pb2.Endpoints]] = [{} for _ in question.keys]
            a.lending.replicas(question.ticket, nowhere, town.now_s)
        a.lending.check()

    assert list(asked) == keys


def test_so_many_are_looked_for_and_no_more(town: Town) -> None:
    a = town["a"]
    keys = [key(number) for number in range(WANTED_KEYS + 1)]

    a.lending.claim(a.namespace, "a", 1, SHARD_BYTES, keys, town.now_s)

    a.lending.check()
    assert a.told(keys[-1]) == ["not claimed"]


def test_who_only_keeps_its_blocks_at_others_still_lends(town: Town) -> None:
    a, b = town["a"], town["b"]
    b.begin(cache(town["c"], [key(900)]))
    town.run(SOON_S)
    assert b.lending.borrowed_bytes

    lend_out(town, 2)

    assert {loan.creditor for loan in a.borrowed()} == {"b"}


def test_a_node_does_not_want_back_what_it_needs_itself(town: Town) -> None:
    a, b = town["a"], town["b"]
    shared = [key(number) for number in range(4)]
    assert all(b.put(each) for each in shared)
    town.report("b")
    a.begin(shared)
    town.until(lambda: places(a, shared) == {"b"})
    assert all(b.put(key(100 + number)) for number in range(SLOTS - 4))

    room = b.make_room()
    town.until(lambda: not room.waiting)
    town.run(SOON_S)

    assert room.state is RoomState.DONE
    assert b.borrowed()
    assert places(a, shared) == {"b"}
    assert "recalled" not in b.told(shared[0])
    town.check_balance()


def test_what_two_have_borrowed_is_wanted_back_from_both(town: Town) -> None:
    town = Town(["a", "b", "c", "d"], cap_bytes=SLOTS * SHARD_BYTES)
    b = town["b"]
    shared = cache(b, [key(number) for number in range(2)])
    for name in ("a", "c"):
        town[name].begin(shared)
    town.until(lambda: b.lending.lent_bytes == 4 * SHARD_BYTES)
    assert all(b.put(key(100 + number)) for number in range(SLOTS - 2))

    room = b.make_room(2)
    town.until(lambda: not room.waiting)
    town.run(SOON_S)

    assert room.state is RoomState.DONE
    assert not b.lending.lent_bytes
    assert not town.missing()
