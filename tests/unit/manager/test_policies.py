"""Rules: durable before they hold, back after a restart, and pins told to whoever has the shard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.manager.small_fabric import OTHER, ROOM, SmallFabric, key, keys

from kvfabric.clock import SystemClock
from kvfabric.directory import Inventory
from kvfabric.errors import Broken, Refused, Retry
from kvfabric.manager.epoch import FencedStore
from kvfabric.manager.events import Delta, Heartbeat, Register
from kvfabric.manager.service import ControlService
from kvfabric.manager.settings import ManagerSettings
from kvfabric.metrics import MANAGER_METRICS, Metrics
from kvfabric.moves import policies
from kvfabric.moves.policies import Drain, Policy, Rules
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.stores import MemoryStore
from kvfabric.types import Key, NamespaceId, NodeId, Tier

A, B = NodeId("a"), NodeId("b")

digests = st.binary(min_size=32, max_size=32)
namespaces = st.none() | digests.map(NamespaceId)


class Aborted(Exception):
    pass


class Context:
    """As far as a call needs gRPC's."""

    def set_trailing_metadata(self, metadata: Any) -> None:
        assert [name for name, _ in metadata] == ["kvfabric-error"]

    def abort(self, code: grpc.StatusCode, text: str) -> None:
        raise Aborted(f"{code.name}: {text}")


class FlakyStore(MemoryStore):
    """Can be away."""

    away = False

    def get(self, key: str) -> Any:
        if self.away:
            raise Retry("the store is away; try again")
        return super().get(key)


def service(store: FlakyStore) -> ControlService:
    settings = ManagerSettings(listen="127.0.0.1:0")
    fenced = FencedStore(store, 1)
    return ControlService(settings, 1, SystemClock(), Metrics(MANAGER_METRICS), fenced)


@pytest.fixture
def store() -> FlakyStore:
    return FlakyStore()


@pytest.fixture
def control(store: FlakyStore) -> Iterator[ControlService]:
    made = service(store)
    yield made
    made.check()


def joined(control: ControlService, node: NodeId, numbers: range, incarnation: int = 1) -> None:
    """The node registers and says that it holds these shards."""
    held = b"".join(keys(numbers))
    now_s = SystemClock().now()
    control._core.register(Register(node, incarnation), now_s)
    control._core.heartbeat(
        Heartbeat(
            node,
            incarnation,
            1,
            Inventory().plus(held),
            full=True,
            added=(Delta(ROOM, Tier.DRAM, held),),
            stats=types_pb2.NodeStats(node=node),
            stream=1,
        ),
        now_s,
    )


# Values


def test_a_namespace_s_own_count_rules_over_the_default() -> None:
    rules = Rules()
    assert (rules.replicas(ROOM), rules.hot_replicas(ROOM), rules.counted()) == (1, 0, [])
    rules.set_policy(None, Policy(2, 1))
    assert (rules.replicas(ROOM), rules.hot_replicas(ROOM)) == (2, 1)
    rules.set_policy(ROOM, Policy(3))
    assert (rules.replicas(ROOM), rules.hot_replicas(ROOM), rules.replicas(OTHER)) == (3, 0, 2)
    rules.set_policy(ROOM, Policy(0, 4))  # the default's count
    assert (rules.replicas(ROOM), rules.hot_replicas(ROOM)) == (2, 4)
    rules.remove_policy(None)
    rules.remove_policy(None)
    assert rules.replicas(OTHER) == 1


@pytest.mark.parametrize("policy", [Policy(17), Policy(-1), Policy(1, 17)])
def test_a_policy_that_cannot_be_kept_is_refused(policy: Policy) -> None:
    with pytest.raises(Refused, match="at most 16"):
        Rules().set_policy(ROOM, policy)


def test_a_shard_s_own_count_rules_over_its_namespace() -> None:
    rules = Rules()
    rules.set_policy(ROOM, Policy(2))
    assert rules.by_replicas(ROOM, keys([1, 2, 3])) == {2: keys([1, 2, 3])}
    rules.counts.say(ROOM, keys([1, 2]), 3)
    rules.counts.say(ROOM, keys([2]), 1)
    assert [rules.replicas(ROOM, each) for each in keys([1, 2, 3])] == [3, 1, 2]
    assert rules.replicas(ROOM) == 2
    assert rules.replicas(OTHER, key(1)) == 1
    assert rules.by_replicas(ROOM, keys([1, 2, 3])) == {3: [key(1)], 1: [key(2)], 2: [key(3)]}
    rules.counts.forget(ROOM, keys([1, 2, 9]))
    assert rules.replicas(ROOM, key(1)) == 2
    assert not rules.counts.any_in(ROOM)
    rules.check()


def test_rules_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "MAX_PINS", 3)
    monkeypatch.setattr(policies, "MAX_COUNTS", 1)
    monkeypatch.setattr(policies, "MAX_POLICIES", 1)
    rules = Rules()
    rules.pins.say(ROOM, keys([1, 2]), said=True)
    rules.pins.say(ROOM, keys([2, 1]), said=True)
    with pytest.raises(Refused, match="2 keys are pinned already, the limit is 3; unpin some"):
        rules.pins.say(OTHER, keys([1, 2]), said=True)
    assert list(rules.pins) == [(ROOM, key(1), True), (ROOM, key(2), True)]
    rules.pins.forget(ROOM, keys([1, 1, 9]))
    rules.pins.say(OTHER, keys([1, 2]), said=True)
    rules.counts.say(ROOM, keys([1]), 2)
    rules.counts.say(ROOM, keys([1, 1]), 3)
    with pytest.raises(Refused, match="1 keys have counts of their own already, the limit is 1"):
        rules.counts.say(ROOM, keys([2]), 2)
    rules.set_policy(ROOM, Policy(2))
    with pytest.raises(Refused, match="1 policies are set already"):
        rules.set_policy(OTHER, Policy(2))
    rules.check()


@given(namespaces, st.integers(0, 16), st.integers(0, 16), digests, digests, st.integers(1, 16))
def test_what_is_written_is_read_back(
    namespace: NamespaceId | None,
    replicas: int,
    hot: int,
    room: bytes,
    shard: bytes,
    number: int,
) -> None:
    rules = Rules()
    subject = (NamespaceId(room), Key(shard))
    drain = Drain(number, 1000)
    for name, value in (
        policies.policy_entry(namespace, Policy(replicas, hot)),
        (policies.pin_key(*subject), b""),
        policies.count_entry(*subject, number),
        policies.drain_entry(A, drain),
    ):
        policies.load(rules, name, value)

    assert list(rules.policies()) == [(namespace, Policy(replicas, hot))]
    assert list(rules.pins) == [(*subject, True)]
    assert list(rules.counts) == [(*subject, number)]
    assert rules.drains == {A: drain}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy/xyz", b""),
        ("policy/00", b""),
        ("policy/default", b"\xff\xff"),
        ("policy/default", control_pb2.Policy(replicas=99).SerializeToString()),
        ("pin/00/00", b""),
        ("replicas/00/00", b"2"),
        (f"replicas/{'00' * 32}/{'00' * 32}", b"two"),
        (f"replicas/{'00' * 32}/{'00' * 32}", b"17"),
        ("drain/a", b"soon"),
        ("drain/a", b""),
    ],
)
def test_an_entry_that_is_none_is_named(name: str, value: bytes) -> None:
    with pytest.raises(Broken, match=name):
        policies.load(Rules(), name, value)


# Pins over the fabric


def fabric(**chaos: float) -> SmallFabric:
    made = SmallFabric(3, **chaos)
    for name in "abc":
        made.add(name)
    made.put("a", range(10))
    made.run(1)
    return made


def test_every_replica_of_a_pinned_key_is_pinned_wherever_it_turns_up() -> None:
    made = fabric()
    made.pin([1, 77])
    made.run(1)
    assert made.nodes[A].pinned == {(ROOM, key(1))}

    made.put("b", [1, 77])
    made.run(1.5)
    assert made.nodes[B].pinned == {(ROOM, key(1)), (ROOM, key(77))}


def test_a_node_that_comes_back_is_told_its_pins_again() -> None:
    made = fabric()
    made.pin([1])
    made.run(1)

    made.start_anew("a", survivors=[(ROOM, key(number)) for number in range(10)])
    made.run(2)

    assert made.nodes[A].pinned == {(ROOM, key(1))}


def test_a_pin_whose_command_was_lost_is_told_again() -> None:
    made = fabric(lost=0.9)
    made.pin(range(10))
    made.run(3000)

    assert len(made.nodes[A].pinned) == 10


def test_an_unpinned_key_is_let_go_everywhere() -> None:
    made = fabric()
    made.put("b", [1])
    made.pin([1, 2])
    made.run(2)

    made.unpin([1])
    made.run(2)

    assert made.nodes[A].pinned == {(ROOM, key(2))}
    assert made.nodes[B].pinned == set()


def test_an_unpin_reaches_a_node_that_was_silent() -> None:
    made = fabric()
    made.pin([1])
    made.run(2)
    made.nodes[A].cut_off = True
    made.run(10)
    made.unpin([1])
    made.nodes[A].cut_off = False
    made.run(130)

    assert made.nodes[A].pinned == set()


def test_a_restarted_manager_keeps_pins() -> None:
    made = fabric()
    made.pin([1])
    made.restart_manager()
    made.run(3)

    assert made.nodes[A].pinned == {(ROOM, key(1))}


# Over the calls


def test_rules_are_there_again_after_a_restart(control: ControlService, store: FlakyStore) -> None:
    joined(control, A, range(3))
    policy = control_pb2.Policy(namespace_id=ROOM, replicas=2, hot_replicas=1)
    control.SetPolicy(control_pb2.SetPolicyRequest(policy=policy), Context())
    default = control_pb2.Policy(replicas=3)
    control.SetPolicy(control_pb2.SetPolicyRequest(policy=default), Context())
    pins = control_pb2.PinKeysRequest(namespace_id=ROOM, keys=keys([1, 2, 9]))
    assert list(control.PinKeys(pins, Context()).statuses) == [1, 1, 3]
    unpin = control_pb2.PinKeysRequest(namespace_id=ROOM, keys=keys([2]), unpin=True)
    control.PinKeys(unpin, Context())
    counts = control_pb2.SetReplicasRequest(namespace_id=ROOM, keys=keys([1, 9, 2]), replicas=4)
    assert list(control.SetReplicas(counts, Context()).statuses) == [1, 3, 1]
    back = control_pb2.SetReplicasRequest(namespace_id=ROOM, keys=keys([2]))
    assert list(control.SetReplicas(back, Context()).statuses) == [1]
    control.Drain(control_pb2.DrainRequest(node="a", bytes_per_s=5), Context())

    again = service(store)

    listed = again.ListPolicies(control_pb2.ListPoliciesRequest(), Context()).policies
    assert list(listed) == [default, policy]
    assert {each for _, each, _ in again._core.moving.rules.pins} == {key(1), key(9)}
    (told,) = again.ListReplicas(control_pb2.ListReplicasRequest(), Context()).counts
    assert told == control_pb2.ShardReplicas(
        namespace_id=ROOM, replicas=4, keys=b"".join(sorted(keys([1, 9])))
    )
    assert again._core.moving.rules.drains == {A: Drain(1, 5)}
    again.tick()
    assert again._core.cluster.draining == {A}


def test_what_was_removed_stays_removed(control: ControlService, store: FlakyStore) -> None:
    joined(control, A, range(3))
    policy = control_pb2.Policy(namespace_id=ROOM, replicas=2)
    control.SetPolicy(control_pb2.SetPolicyRequest(policy=policy), Context())
    control.SetPolicy(control_pb2.SetPolicyRequest(policy=policy, remove=True), Context())
    control.Drain(control_pb2.DrainRequest(node="a"), Context())
    control.Drain(control_pb2.DrainRequest(node="a", cancel=True), Context())

    again = service(store)

    assert not again.ListPolicies(control_pb2.ListPoliciesRequest(), Context()).policies
    assert not again._core.moving.rules.drains
    assert not control._core.cluster.draining


def test_while_the_store_is_away_nothing_changes_and_reads_go_on(
    control: ControlService, store: FlakyStore
) -> None:
    joined(control, A, range(3))
    policy = control_pb2.Policy(namespace_id=ROOM, replicas=2)
    control.SetPolicy(control_pb2.SetPolicyRequest(policy=policy), Context())
    store.away = True

    changes: tuple[tuple[Any, Any], ...] = (
        (control.SetPolicy, control_pb2.SetPolicyRequest(policy=control_pb2.Policy(replicas=5))),
        (control.SetPolicy, control_pb2.SetPolicyRequest(policy=policy, remove=True)),
        (control.PinKeys, control_pb2.PinKeysRequest(namespace_id=ROOM, keys=keys([1]))),
        (
            control.SetReplicas,
            control_pb2.SetReplicasRequest(namespace_id=ROOM, keys=keys([1]), replicas=2),
        ),
        (control.Drain, control_pb2.DrainRequest(node="a")),
    )
    for call, request in changes:
        with pytest.raises(Aborted, match="UNAVAILABLE: the store is away"):
            call(request, Context())
    listed = control.ListPolicies(control_pb2.ListPoliciesRequest(), Context()).policies

    assert list(listed) == [policy]
    assert not control._core.moving.rules.pins
    assert not control._core.moving.rules.counts
    assert not control._core.cluster.draining
    store.away = False
    control.Drain(control_pb2.DrainRequest(node="a"), Context())
    store.away = True
    assert not control.Drain(control_pb2.DrainRequest(node="a"), Context()).empty  # only asks


def test_the_drain_of_a_node_that_came_back_empty_is_forgotten_in_the_store_too(
    control: ControlService, store: FlakyStore
) -> None:
    joined(control, A, range(3))
    control.Drain(control_pb2.DrainRequest(node="a"), Context())
    joined(control, A, range(0), incarnation=2)
    control.tick()
    assert control._core.moving.draining.changed == [A]

    store.away = True
    control.keep_drains()
    assert control._core.moving.draining.changed == [A]
    store.away = False
    control.keep_drains()

    assert control._core.moving.draining.changed == []
    assert not service(store)._core.moving.rules.drains


def test_moves_are_begun_listed_and_called_off(control: ControlService) -> None:
    joined(control, A, range(3))
    joined(control, B, range(0))
    request = control_pb2.MigrateRequest(
        namespace_id=ROOM, keys=keys([1, 2]), source="a", destination="b"
    )

    begun = control.Migrate(request, Context())
    (move,) = control.ListMoves(control_pb2.ListMovesRequest(move=begun.move), Context()).moves
    assert (begun.keys, move.keys, move.kind, move.source, move.destination) == (
        2,
        2,
        "migrate",
        "a",
        "b",
    )
    assert move.state == control_pb2.MOVE_STATE_COPYING
    stats = control.Stats(control_pb2.ControlServiceStatsRequest(), Context())
    counters = {counter.name: counter.value for counter in stats.counters}
    assert counters['kvfabric_manager_moves{kind="migrate"}'] == 1
    assert counters['kvfabric_manager_copied_shards_total{kind="migrate"}'] == 0
    control.CancelMove(control_pb2.CancelMoveRequest(move=begun.move), Context())
    (move,) = control.ListMoves(control_pb2.ListMovesRequest(), Context()).moves
    assert move.state == control_pb2.MOVE_STATE_CANCELLED
    assert not control.ListMoves(control_pb2.ListMovesRequest(move=99), Context()).moves


@pytest.mark.parametrize(
    ("name", "request_", "why"),
    [
        ("Migrate", control_pb2.MigrateRequest(source="a", destination="x"), "x is no node"),
        ("Migrate", control_pb2.MigrateRequest(source="a b"), "cannot name a node"),
        ("Migrate", control_pb2.MigrateRequest(source="a", priority=9), "9 is no priority"),
        ("Migrate", control_pb2.MigrateRequest(keys=[b"1"]), "key 0 has 1 bytes"),
        ("CancelMove", control_pb2.CancelMoveRequest(move=7), "no move 7"),
        ("Drain", control_pb2.DrainRequest(node="x"), "no node x"),
        (
            "SetPolicy",
            control_pb2.SetPolicyRequest(policy=control_pb2.Policy(replicas=99)),
            "at most 16",
        ),
        ("PinKeys", control_pb2.PinKeysRequest(keys=[bytes(32)]), "namespace id is 32 bytes"),
        ("SetReplicas", control_pb2.SetReplicasRequest(), "namespace id is 32 bytes"),
        (
            "SetReplicas",
            control_pb2.SetReplicasRequest(namespace_id=ROOM, keys=[bytes(32)], replicas=17),
            "1 to 16 replicas, not 17",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(
    control: ControlService, name: str, request_: Any, why: str
) -> None:
    joined(control, A, range(3))

    with pytest.raises(Aborted, match=f"INVALID_ARGUMENT: .*{why}"):
        getattr(control, name)(request_, Context())
