"""What a sequence has at other nodes is claimed there, so that they do not evict it: when its
creditor dies and a replica is left, and when it is opened anew."""

from __future__ import annotations

import pytest
from tests.faults.conftest import ANSWER_TIMEOUT_S, bytes_of, key_of, until
from tests.faults.conftest import SPACE as OTHERS
from tests.faults.loans.conftest import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    QUIET_S,
    SPACE,
    Growth,
    Lenders,
    ids,
    kv,
)

from kvfabric.errors import Conflict
from kvfabric.keys import namespace_id
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Status
from kvfabric_nodes.store.extents import slot_bytes

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

FILLING = 400  # shards of a block's size: more than fit at any node
BATCH = 40


def replicate(lenders: Lenders, growth: Growth) -> None:
    """Has the manager keep two replicas of every block, and waits for them."""
    until(lambda: all_held(lenders), "no loan is on its way any more", QUIET_S)
    policy = control_pb2.Policy(namespace_id=namespace_id(SPACE), replicas=2)
    with lenders.control() as stub:
        stub.SetPolicy(control_pb2.SetPolicyRequest(policy=policy), timeout=ANSWER_TIMEOUT_S)
    until(lambda: replicated(lenders, growth), "every lent block has two replicas", QUIET_S)


def all_held(lenders: Lenders) -> bool:
    ledger = lenders.ledger()
    return set(ledger.borrowed.state) == set(ledger.lent.state) == {control_pb2.LOAN_STATE_HELD}


def replicated(lenders: Lenders, growth: Growth) -> bool:
    """Whether both lenders have every block that is not at home."""
    keys = [place.key for place in growth.sequence.blocks() if place.key and place.node != "home"]
    request = control_pb2.LocateRequest(namespace_id=namespace_id(SPACE), keys=keys)
    with lenders.control() as stub:
        answer = stub.Locate(request, timeout=ANSWER_TIMEOUT_S)
    nodes = [set(place.nodes) for place in answer.places] + [set()]
    return all(nodes[index] >= {"east", "west"} for index in answer.place)


def elsewhere(growth: Growth) -> list[str]:
    """Where its sealed blocks are that are not at home, as home knows."""
    return [place.node for place in growth.sequence.blocks() if place.key and place.node != "home"]


def all_claimed(lenders: Lenders, growth: Growth) -> bool:
    owed = len(elsewhere(growth)) * slot_bytes(BLOCK_BYTES)
    ledger = lenders.ledger()
    return ledger.lent_bytes == ledger.borrowed_bytes == owed > 0


def append(growth: Growth) -> None:
    """A block more, behind whatever is left of it."""
    start = growth.sequence.length
    end = start + BLOCK_TOKENS
    growth.sequence.append(ids(start, end), kv(start, end))


def fill_with_cache(lenders: Lenders, name: str) -> None:
    """Puts so much at the node that it evicts whatever nobody claims."""
    room = lenders.client(name).open(OTHERS)
    for first in range(0, FILLING, BATCH):
        keys = [key_of(number, f"at {name}") for number in range(first, first + BATCH)]
        statuses = room.put(keys, [bytes_of(key, BLOCK_BYTES) for key in keys])
        assert statuses == [Status.OK] * BATCH


def test_a_replica_of_what_a_dead_creditor_had_is_claimed(lenders: Lenders) -> None:
    lenders.start()
    growth = Growth(lenders.client()).wait()
    replicate(lenders, growth)
    assert "east" in elsewhere(growth)

    lenders.nodes["east"].kill()
    lenders.fallen("east")
    until(lambda: set(elsewhere(growth)) == {"west"}, "home knows where its blocks are", QUIET_S)
    until(lambda: all_claimed(lenders, growth), "all of them are claimed", QUIET_S)
    fill_with_cache(lenders, "west")

    assert growth.missing() == 0
    lenders.check_books()
    growth.close()
    lenders.check_quiet()


def test_a_sequence_that_is_opened_anew_claims_what_others_have(lenders: Lenders) -> None:
    lenders.start()
    growth = Growth(lenders.client()).wait()
    lenders.nodes["home"].kill()
    lenders.start_node("home")
    until(lambda: not lenders.ledger().lent_bytes, "its loans have ended", QUIET_S)

    with pytest.raises(Conflict, match="lost with a node"):
        append(growth)  # the client opens it again, with what the others have
    append(growth)
    until(lambda: all_claimed(lenders, growth), "all of it is claimed", QUIET_S)
    for name in ("east", "west"):
        fill_with_cache(lenders, name)

    assert growth.missing() == 0
    lenders.check_books()
    growth.close()
    lenders.check_quiet()
