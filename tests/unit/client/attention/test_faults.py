"""Nodes that hang, die, or forget: the right answer, or which tokens are missing, in time."""

from __future__ import annotations

import time

import numpy as np
import pytest
from tests.unit.client.test_deadlines import stalled
from tests.unit.client.test_outgrown import wait_for

from kvfabric.attention.merge import Partial
from kvfabric.errors import Refused
from kvfabric.rpc.v1 import control_pb2, node_pb2
from kvfabric_client import Client, Missing, Sequence

from .lending import FORM, QUERIES, SPACE, TOKENS, Nodes, at, give_back, right
from .numbers import Array, check, fill, random_queries


def test_a_node_that_dies_leaves_exactly_its_tokens_missing(
    lent: Sequence, kv: Array, nodes: Nodes
) -> None:
    right(lent, kv)
    theirs = at(lent, "east")
    nodes["east"].stop()
    with pytest.raises(Missing) as missing:
        lent.attend(QUERIES, layer=0)
    assert missing.value.ranges == theirs
    assert lent.read_into(np.empty_like(kv[..., :TOKENS, :])) == theirs


def test_a_node_that_hangs_is_given_up_in_time_and_not_waited_for_again(
    lent: Sequence, kv: Array, nodes: Nodes
) -> None:
    right(lent, kv)
    theirs = at(lent, "east")
    with stalled(nodes["east"]):
        began_s = time.monotonic()
        with pytest.raises(Missing) as missing:
            lent.attend(QUERIES, layer=0, timeout_s=4)
        assert time.monotonic() - began_s < 4
        assert missing.value.ranges == theirs
        began_s = time.monotonic()
        with pytest.raises(Missing):
            lent.attend(QUERIES, layer=1, timeout_s=4)
        assert time.monotonic() - began_s < 2  # half of the time would have been its
    wait_for(lambda: not lent.writer.room.client.hanging())
    right(lent, kv)


def test_a_hanging_nodes_blocks_are_attended_at_another_replica(
    client: Client, lent: Sequence, kv: Array, nodes: Nodes
) -> None:
    right(lent, kv)
    request = control_pb2.MigrateRequest(source="east", destination="west", copy=True)
    client.manager().migrate(request, client.deadline(20))
    done = control_pb2.MOVE_STATE_DONE
    wait_for(lambda: all(move.state == done for move in client.manager().moves(client.deadline(5))))
    with stalled(nodes["east"]):
        tokens = right(lent, kv, timeout_s=8)
    assert "east" not in tokens
    assert sum(tokens.values()) == TOKENS


def test_spans_that_a_node_has_forgotten_are_opened_again(lent: Sequence, kv: Array) -> None:
    right(lent, kv)
    spans = list(lent.context._spans.values())
    assert len(spans) == 3
    for span in spans:
        request = node_pb2.CloseSpanRequest(spans=[span.id])
        span.link.call("close_span", request, time.monotonic() + 5)
    right(lent, kv)
    for span in spans:
        if span.link is not lent.writer.home.link:
            span.link.close()  # the session has ended, with a restart say
    right(lent, kv)


def test_a_span_that_was_extended_after_its_caller_had_gone_is_no_obstacle(
    lent: Sequence, kv: Array, nodes: Nodes
) -> None:
    some = at(lent, "east")[0]
    lent.attend(QUERIES, layer=0, tokens=[range(some.start, some.start + 20)])
    with stalled(nodes["east"]), pytest.raises(Missing):
        lent.attend(QUERIES, layer=0, timeout_s=4)
    wait_for(lambda: not lent.writer.room.client.hanging())
    right(lent, kv)


def test_many_calls_under_way_to_a_node_that_has_forgotten_its_spans(
    lent: Sequence, kv: Array
) -> None:
    rows = random_queries(3000, 4, 32)
    want = lent.attend(rows, layer=0)
    for span in lent.context._spans.values():
        request = node_pb2.CloseSpanRequest(spans=[span.id])
        span.link.call("close_span", request, time.monotonic() + 5)
    check(lent.attend(rows, layer=0), Partial(want.o, want.lse))


def test_a_refusal_that_stays_is_told(lent: Sequence) -> None:
    with pytest.raises(Refused, match="scale"):
        lent.attend(QUERIES, layer=0, scale=float("nan"))


def test_open_tokens_that_went_with_their_home_are_missing(
    client: Client, nodes: Nodes, kv: Array
) -> None:
    room = client.open(SPACE)
    with room.sequence(FORM) as sequence:
        fill(sequence, kv[..., :40, :])
        right(sequence, kv)
        sequence.writer.home.link.close()
        with pytest.raises(Missing) as missing:
            sequence.attend(QUERIES, layer=0)
        assert missing.value.ranges == [range(32, 40)]
        fill(sequence, kv[..., :40, :])
        right(sequence, kv)


def test_what_was_lost_by_a_death_is_given_back(lent: Sequence, kv: Array, nodes: Nodes) -> None:
    lent.truncate(1500)  # so that what is left has room for it
    right(lent, kv)
    holder = lent.blocks()[10].node
    assert holder != "home"
    nodes[holder].stop()
    with pytest.raises(Missing) as missing:
        lent.attend(QUERIES, layer=0)
    assert any(165 in tokens for tokens in missing.value.ranges)
    give_back(lent, kv, missing.value.ranges)
