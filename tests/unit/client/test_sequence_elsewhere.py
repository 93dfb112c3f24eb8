"""Sequences and groups whose blocks lie on another node when they begin."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from kvfabric import checksums
from kvfabric.manager.service import ManagerServer
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Status

from .conftest import Start, key
from .test_deadlines import eventually
from .test_elsewhere import manager as manager  # a fixture
from .test_sequence_calls import LAYERS, TOKENS, Wire, Writer, block


@pytest.fixture
def links(start: Start, manager: ManagerServer) -> Iterator[tuple[Wire, Wire]]:
    """Sessions with two nodes of one fabric."""
    with contextlib.ExitStack() as stack:
        nodes = [start(name, manager=manager.address) for name in ("n0", "n1")]
        home, away = (stack.enter_context(contextlib.closing(Wire(n))) for n in nodes)
        yield home, away


def seen(home: Wire, number: int) -> bool:
    """Whether the home node can learn where this key lies."""
    request = node_pb2.MatchRequest(namespace_id=home.space, keys=[key(number)])
    return bool(home.call("Match", request).matched)


def test_a_sequence_begins_with_blocks_of_another_node(links: tuple[Wire, Wire]) -> None:
    home, away = links
    Writer(home).put(1)
    Writer(away).put(2, 3)
    assert eventually(lambda: seen(home, 3))

    writer = Writer(home, keys=[1, 2, 3, 4])

    assert list(writer.opened.statuses) == [Status.OK] * 3 + [Status.MISS]
    assert writer.opened.length == 3 * TOKENS
    described = home.call("Describe", node_pb2.DescribeRequest(sequence=writer.id))
    assert [described.nodes[place] for place in described.place] == ["n0", "n1", "n1"]


def test_a_block_of_another_node_is_fetched_to_be_cut(links: tuple[Wire, Wire]) -> None:
    home, away = links
    Writer(away).put(1, 2)
    assert eventually(lambda: seen(home, 2))
    writer = Writer(home, keys=[1, 2])

    writer.call("Truncate", tokens=TOKENS + 1)

    writer.call("Append", start=TOKENS + 1, tokens=TOKENS - 1)  # what was copied, as it is
    sums = checksums.checksums(block(2), LAYERS)
    answer = writer.call("Seal", keys=[key(9)], checksums=sums)
    assert list(answer.statuses) == [Status.OK]


def test_a_group_fetches_what_its_batch_shares(links: tuple[Wire, Wire]) -> None:
    home, away = links
    Writer(away).put(1, 2)
    assert eventually(lambda: seen(home, 2))
    chains = [key(n) for n in (1, 2, 3, 1, 2, 4)]
    request = node_pb2.OpenGroupRequest(namespace_id=home.space, keys=chains, lengths=[3, 3])

    group = home.call("OpenGroup", request)

    assert list(group.statuses) == [Status.OK, Status.OK]
    assert list(group.nodes) == ["n0", "n0"]
    closed = home.call("CloseGroup", node_pb2.CloseGroupRequest(group=group.group))
    assert closed.shards == 2  # they came for the group


def test_a_group_without_its_manager_computes_what_is_not_here(
    links: tuple[Wire, Wire], manager: ManagerServer
) -> None:
    home, away = links
    Writer(home).put(1)
    Writer(away).put(2)
    manager.stop()
    chains = [key(n) for n in (1, 2, 1, 2)]
    request = node_pb2.OpenGroupRequest(namespace_id=home.space, keys=chains, lengths=[2, 2])

    group = home.call("OpenGroup", request)

    assert list(group.statuses) == [Status.OK, Status.MISS]
    assert list(group.nodes) == ["n0", ""]
