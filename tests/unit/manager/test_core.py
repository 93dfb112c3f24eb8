"""The manager's decisions by example."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvfabric.directory import Inventory, Replica
from kvfabric.errors import Broken, Retry
from kvfabric.manager.core import ManagerCore
from kvfabric.manager.events import (
    Answer,
    Cause,
    Delta,
    Explained,
    Heartbeat,
    Lost,
    Outcome,
    Register,
    Registered,
)
from kvfabric.membership import TRANSITIONS, Membership, NodeState
from kvfabric.rpc.v1 import types_pb2
from kvfabric.types import Key, NamespaceId, NodeId, Tier

ROOM, OTHER = NamespaceId(b"r" * 32), NamespaceId(b"o" * 32)
N0, N1 = NodeId("n0"), NodeId("n1")
SILENCE_S = 5.0


def key(number: int) -> Key:
    return Key(bytes([number]) * 32)


def packed(*numbers: int) -> bytes:
    return b"".join(key(number) for number in numbers)


def holding(*numbers: int) -> Inventory:
    return Inventory().plus(packed(*numbers))


def delta(*numbers: int, room: NamespaceId = ROOM, tier: Tier = Tier.DRAM) -> tuple[Delta, ...]:
    return (Delta(room, tier, packed(*numbers)),)


def beat(
    sequence: int,
    *,
    holds: Inventory,
    added: tuple[Delta, ...] = (),
    removed: tuple[Delta, ...] = (),
    node: NodeId = N0,
    incarnation: int = 1,
    full: bool = False,
    more: bool = False,
    stream: int = 1,
) -> Heartbeat:
    return Heartbeat(node, incarnation, sequence, holds, full, more, added, removed, stream=stream)


def applied(sequence: int) -> Answer:
    return Answer(sequence, Outcome.APPLIED)


def where(core: ManagerCore, *numbers: int) -> list[tuple[NodeId, ...]]:
    located = core.locate(ROOM, [key(number) for number in numbers], prefix=False)
    places = [*located.places, ()]
    return [tuple(replica.node for replica in places[index]) for index in located.indices]


@pytest.fixture
def core() -> Iterator[ManagerCore]:
    core = ManagerCore(SILENCE_S, 0.0)
    yield core
    core.check()


@pytest.fixture
def joined(core: ManagerCore) -> ManagerCore:
    """n0, incarnation 1, holds keys 1 and 2 since its first heartbeat, at 0 s."""
    assert core.register(Register(N0, 1), 0.0) == Registered(0)
    assert core.heartbeat(beat(1, added=delta(1, 2), holds=holding(1, 2)), 0.0) == applied(1)
    return core


# Deltas


def test_deltas_move_the_directory_along(joined: ManagerCore) -> None:
    answer = joined.heartbeat(beat(2, added=delta(3), removed=delta(1), holds=holding(2, 3)), 0.5)

    assert answer == applied(2)
    assert where(joined, 1, 2, 3) == [(), (N0,), (N0,)]
    assert (joined.keys, joined.replicas) == (2, 2)


def test_a_key_removed_and_added_in_one_message_is_there(joined: ManagerCore) -> None:
    answer = joined.heartbeat(beat(2, added=delta(1), removed=delta(1), holds=holding(1, 2)), 0.5)

    assert answer == applied(2)
    assert where(joined, 1) == [(N0,)]


def test_a_move_between_tiers_is_followed(joined: ManagerCore) -> None:
    demoted = beat(2, removed=delta(1), added=delta(1, tier=Tier.FILE), holds=holding(1, 2))

    assert joined.heartbeat(demoted, 0.5) == applied(2)
    assert joined.locate(ROOM, [key(1)], prefix=True).places == [(Replica(N0, Tier.FILE),)]


def test_a_duplicate_is_acknowledged_and_changes_nothing(joined: ManagerCore) -> None:
    again = beat(1, added=delta(9), holds=holding(9))

    assert joined.heartbeat(again, 0.5) == Answer(1, Outcome.DUPLICATE)
    assert where(joined, 1, 2, 9) == [(N0,), (N0,), ()]


def test_a_delta_in_several_messages_is_compared_at_its_end(joined: ManagerCore) -> None:
    first = beat(2, added=delta(3), holds=Inventory(), more=True)
    last = beat(3, added=delta(4), holds=holding(1, 2, 3, 4))

    assert [joined.heartbeat(first, 0.5), joined.heartbeat(last, 0.5)] == [applied(2), applied(3)]
    joined.check()


# Trust lost and found


def test_a_gap_asks_for_a_full_report_and_voids_deltas_until_then(joined: ManagerCore) -> None:
    # When message 2 never came
    answer = joined.heartbeat(beat(3, added=delta(4), holds=holding(1, 3, 4)), 0.5)
    assert answer == Answer(3, Outcome.DISTRUSTED, want_full=True, cause=Cause.GAP)
    assert joined.states()[NodeState.RESYNC] == 1

    # Then further deltas are not applied and the wish is repeated
    answer = joined.heartbeat(beat(4, added=delta(5), holds=holding(1, 3, 4, 5)), 0.6)
    assert answer == Answer(4, Outcome.DISTRUSTED, want_full=True)
    assert where(joined, 1, 2, 3, 4, 5) == [(N0,), (N0,), (), (), ()]

    # And the full report mends everything
    report = beat(5, full=True, added=delta(1, 3, 4, 5), holds=holding(1, 3, 4, 5))
    assert joined.heartbeat(report, 0.7) == applied(5)
    assert where(joined, 1, 2, 3, 4, 5) == [(N0,), (), (N0,), (N0,), (N0,)]
    assert joined.states()[NodeState.LIVE] == 1


def test_drift_asks_for_a_full_report(joined: ManagerCore) -> None:
    answer = joined.heartbeat(beat(2, added=delta(3), holds=holding(1, 3)), 0.5)

    assert answer == Answer(2, Outcome.DISTRUSTED, want_full=True, cause=Cause.DRIFT)


def test_equal_counts_with_other_keys_are_drift(joined: ManagerCore) -> None:
    answer = joined.heartbeat(beat(2, holds=holding(1, 3)), 0.5)

    assert answer.cause is Cause.DRIFT
    assert answer.want_full


def test_a_full_report_in_several_messages_replaces_everything_at_its_end(
    joined: ManagerCore,
) -> None:
    # When two of three messages have come
    assert joined.heartbeat(
        beat(2, full=True, more=True, added=delta(2), holds=Inventory()), 0.5
    ) == applied(2)
    assert joined.heartbeat(
        beat(3, full=True, more=True, added=delta(3, 4), holds=Inventory()), 0.5
    ) == applied(3)

    # Then nothing has changed yet
    joined.check()
    assert where(joined, 1, 2, 3, 4) == [(N0,), (N0,), (), ()]

    # And with the last, from which a key is gone again, everything does
    last = beat(4, full=True, removed=delta(4), added=delta(5), holds=holding(2, 3, 5))
    assert joined.heartbeat(last, 0.5) == applied(4)
    assert where(joined, 1, 2, 3, 4, 5) == [(), (N0,), (N0,), (), (N0,)]


def test_a_full_report_that_lacks_a_message_is_not_shown(joined: ManagerCore) -> None:
    joined.heartbeat(beat(2, full=True, more=True, added=delta(3), holds=Inventory()), 0.5)

    # When message 3 of the report never came
    last = beat(4, full=True, added=delta(5), holds=holding(3, 4, 5))
    answer = joined.heartbeat(last, 0.5)

    assert answer == Answer(4, Outcome.DISTRUSTED, want_full=True, cause=Cause.MISMATCH)
    assert where(joined, 1, 2, 3, 5) == [(N0,), (N0,), (), ()]


def test_a_full_report_that_is_broken_off_is_asked_for_again(joined: ManagerCore) -> None:
    joined.heartbeat(beat(2, full=True, more=True, added=delta(3), holds=Inventory()), 0.5)

    answer = joined.heartbeat(beat(3, holds=holding(3)), 0.5)

    assert answer == Answer(3, Outcome.DISTRUSTED, want_full=True, cause=Cause.BROKEN_OFF)
    assert where(joined, 1, 3) == [(N0,), ()]


def test_a_full_report_with_a_wrong_count_is_refused_and_asked_for_again(
    joined: ManagerCore,
) -> None:
    answer = joined.heartbeat(beat(2, full=True, added=delta(3), holds=holding(3, 4)), 0.5)

    assert answer == Answer(2, Outcome.DISTRUSTED, want_full=True, cause=Cause.MISMATCH)
    assert where(joined, 1, 3) == [(N0,), ()]


def test_a_new_stream_may_number_its_heartbeats_anew(joined: ManagerCore) -> None:
    joined.heartbeat(beat(2, added=delta(3), holds=holding(1, 2, 3)), 0.5)

    # When the node's stream broke, and it reports in full on its next one
    report = beat(1, stream=2, full=True, added=delta(2, 3), holds=holding(2, 3))
    assert joined.heartbeat(report, 1.0) == applied(1)

    # Then what still comes on the old stream is stale
    late = beat(3, stream=1, full=True, added=delta(1), holds=holding(1))
    assert joined.heartbeat(late, 1.0) == Answer(3, Outcome.DUPLICATE)
    assert where(joined, 1, 2, 3) == [(), (N0,), (N0,)]
    assert joined.heartbeat(beat(2, stream=2, holds=holding(2, 3)), 1.5) == applied(2)


def test_a_delta_that_opens_a_new_stream_is_not_believed(joined: ManagerCore) -> None:
    answer = joined.heartbeat(beat(1, stream=2, holds=holding(1, 2)), 0.5)

    assert answer == Answer(1, Outcome.DISTRUSTED, want_full=True, cause=Cause.GAP)


# Who is who


def test_an_unknown_node_is_told_to_register(core: ManagerCore) -> None:
    answer = core.heartbeat(beat(1, added=delta(1), holds=holding(1)), 0.0)

    assert answer == Answer(1, Outcome.STRANGER, want_register=True)
    assert where(core, 1) == [()]


def test_a_manager_that_restarted_is_told_everything_within_two_heartbeats(
    core: ManagerCore,
) -> None:
    # Given a node that has run for long, and a manager that knows nothing
    core.register(Register(N0, 7), 0.0)

    first = core.heartbeat(beat(901, incarnation=7, added=delta(4), holds=holding(1, 2, 4)), 0.0)
    second = core.heartbeat(
        beat(902, incarnation=7, full=True, added=delta(1, 2, 4), holds=holding(1, 2, 4)), 0.5
    )

    assert (first.want_full, first.cause) == (True, Cause.DRIFT)
    assert second == applied(902)
    assert where(core, 1, 2, 4) == [(N0,), (N0,), (N0,)]


def test_an_older_incarnation_is_fenced(joined: ManagerCore) -> None:
    assert joined.register(Register(N0, 3), 1.0) == Registered(0)

    assert joined.register(Register(N0, 2), 1.0) == Registered(known_incarnation=3)
    late = beat(2, incarnation=1, added=delta(5), holds=holding(1, 2, 5))
    assert joined.heartbeat(late, 1.0) == Answer(2, Outcome.STRANGER, want_register=True)
    assert where(joined, 5) == [()]


def test_a_newer_incarnation_starts_with_nothing(joined: ManagerCore) -> None:
    joined.register(Register(N0, 2), 1.0)

    assert where(joined, 1, 2) == [(), ()]
    adopted = beat(1, incarnation=2, added=delta(2), holds=holding(2))
    assert joined.heartbeat(adopted, 1.0) == applied(1)
    assert where(joined, 1, 2) == [(), (N0,)]


def test_registering_again_changes_endpoints_only(joined: ManagerCore) -> None:
    endpoints = types_pb2.Endpoints(tcp_address="10.0.0.1:7")

    assert joined.register(Register(N0, 1, endpoints, labels={"zone": "b"}), 1.0) == Registered(0)

    (member,) = joined.members()
    assert (member.endpoints, member.labels, member.heard_s) == (endpoints, {"zone": "b"}, 1.0)
    assert joined.heartbeat(beat(2, holds=holding(1, 2)), 1.0) == applied(2)


def test_nodes_are_apart(joined: ManagerCore) -> None:
    joined.register(Register(N1, 1), 0.0)
    joined.heartbeat(beat(1, node=N1, added=delta(2, 3), holds=holding(2, 3)), 0.0)
    joined.heartbeat(beat(2, removed=delta(2), holds=holding(1)), 0.5)

    assert where(joined, 1, 2, 3) == [(N0,), (N1,), (N1,)]


def test_when_all_nodes_are_alive_one_too_many_is_told_to_wait() -> None:
    members = Membership(SILENCE_S, max_nodes=1)
    nothing = types_pb2.Endpoints(), types_pb2.NodeStats()
    members.admit(N0, 1, *nothing, {}, 0.0)

    with pytest.raises(Retry, match="1 nodes are registered and alive, which is the limit"):
        members.admit(N1, 1, *nothing, {}, 0.0)

    # A lost one makes room
    members.move(N0, NodeState.LOST)
    assert members.admit(N1, 1, *nothing, {}, 0.0) == N0
    assert members.known_incarnation(N0) == 0
    members.check()


# Silence


def test_a_silent_node_is_lost_with_its_replicas(joined: ManagerCore) -> None:
    joined.register(Register(N1, 1), 0.0)
    joined.heartbeat(beat(1, node=N1, added=delta(2), holds=holding(2)), 0.0)
    assert joined.tick(2.0) == []
    joined.heartbeat(beat(2, node=N1, holds=holding(2)), 4.0)
    assert joined.tick(4.0) == []
    assert joined.tick(5.0) == []  # n0 was heard exactly 5 s ago

    assert joined.tick(5.1) == [Lost(N0, incarnation=1, replicas=2)]

    assert joined.tick(5.2) == []
    assert where(joined, 1, 2) == [(), (N1,)]
    assert joined.states() == {NodeState.LIVE: 1, NodeState.RESYNC: 0, NodeState.LOST: 1}


def test_a_lost_node_that_returns_is_asked_for_everything(joined: ManagerCore) -> None:
    for now_s in (2.0, 4.0, 6.0):
        joined.tick(now_s)

    answer = joined.heartbeat(beat(2, added=delta(3), holds=holding(1, 2, 3)), 7.0)
    assert answer == Answer(2, Outcome.DISTRUSTED, want_full=True, cause=Cause.RETURNED)

    report = beat(3, full=True, added=delta(1, 2, 3), holds=holding(1, 2, 3))
    assert joined.heartbeat(report, 7.5) == applied(3)
    assert where(joined, 1, 2, 3) == [(N0,), (N0,), (N0,)]


def test_a_lost_node_that_returns_with_a_full_report_is_live_at_once(joined: ManagerCore) -> None:
    for now_s in (2.0, 4.0, 6.0):
        joined.tick(now_s)

    report = beat(9, full=True, added=delta(1), holds=holding(1))

    assert joined.heartbeat(report, 7.0) == applied(9)
    assert where(joined, 1) == [(N0,)]


def test_a_node_lost_in_the_middle_of_its_report_leaves_nothing(joined: ManagerCore) -> None:
    joined.heartbeat(beat(2, full=True, more=True, added=delta(3), holds=Inventory()), 0.5)
    for now_s in (2.0, 4.0, 6.0):
        joined.tick(now_s)

    joined.check()
    assert (joined.keys, joined.replicas) == (0, 0)


def test_nobody_is_lost_because_the_manager_itself_was_stopped(joined: ManagerCore) -> None:
    joined.tick(1.0)

    assert joined.tick(60.0) == []
    assert where(joined, 1) == [(N0,)]
    assert joined.tick(62.0) == []
    assert joined.tick(64.0) == []
    assert joined.tick(65.5) == [Lost(N0, incarnation=1, replicas=2)]


# Explaining


def test_explain_tells_a_keys_life_and_that_of_its_nodes(joined: ManagerCore) -> None:
    joined.register(Register(N1, 4), 1.0)
    joined.heartbeat(
        beat(1, node=N1, incarnation=4, added=delta(9, room=OTHER), holds=holding(9)), 1.0
    )
    joined.heartbeat(beat(2, removed=delta(1), holds=holding(2)), 3.0)

    explained = joined.explain(ROOM, key(1)[:4], 10.0)

    assert explained.events == (
        Explained(10.0, N0, "registered", "incarnation 1"),
        Explained(10.0, N0, "added", "heartbeat 1, dram"),
        Explained(7.0, N0, "removed", "heartbeat 2, dram"),
    )
    assert explained.places == ()
    assert joined.explain(None, key(9), 10.0).places == ((Replica(N1, Tier.DRAM),),)
    assert joined.explain(ROOM, key(9), 10.0).events == ()


def test_explain_finds_keys_at_their_beginning_only(joined: ManagerCore) -> None:
    # Key 7 is followed by key 8, so that 07 07 08 08 occurs in the packed keys, inside of one.
    joined.heartbeat(beat(2, added=delta(7, 8), holds=holding(1, 2, 7, 8)), 0.5)

    assert joined.explain(ROOM, b"\x07\x07\x08\x08", 1.0).events == ()


# The table


@pytest.mark.parametrize("before", NodeState)
@pytest.mark.parametrize("after", NodeState)
def test_states_change_along_the_table_only(before: NodeState, after: NodeState) -> None:
    members = Membership(SILENCE_S)
    members.admit(N0, 1, types_pb2.Endpoints(), types_pb2.NodeStats(), {}, 0.0)
    members[N0].state = before

    if after in TRANSITIONS[before]:
        members.move(N0, after)
        assert members[N0].state is after
    else:
        with pytest.raises(Broken, match=f"{before.value} to {after.value}"):
            members.move(N0, after)


def test_check_finds_a_lost_node_that_still_holds(joined: ManagerCore) -> None:
    joined.check()
    joined._members[N0].state = NodeState.LOST

    with pytest.raises(Broken, match="n0 is lost and yet holds"):
        joined.check()
    joined._members[N0].state = NodeState.LIVE
