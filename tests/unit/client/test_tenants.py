"""Nobody reads, writes, maps or probes another tenant's namespace."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from google.protobuf import message_factory

import kvfabric_client
from kvfabric.errors import Denied, FabricError, Refused
from kvfabric.rpc.v1 import node_pb2, wire_pb2
from kvfabric.types import Namespace, Status
from kvfabric_client.link import Link
from kvfabric_nodes.node import Node

from .conftest import MEMORY_BYTES, SEGMENT_BYTES, address, core_of, key, payload

A, B = Namespace("a", b"f" * 32), Namespace("b", b"f" * 32)


@pytest.fixture
def mine(node: Node) -> Any:
    with contextlib.closing(
        kvfabric_client.connect(address(node, "unix"), tenant="a", timeout_s=10)
    ) as client:
        yield client.open(A)


@pytest.fixture
def theirs(node: Node) -> Any:
    with contextlib.closing(
        kvfabric_client.connect(address(node, "unix"), tenant="b", timeout_s=10)
    ) as client:
        yield client.open(B)


def test_a_client_opens_its_own_tenants_rooms_only(mine: Any) -> None:
    with pytest.raises(Refused, match="cannot open a namespace of 'b'"):
        mine.client.open(B)


def test_equal_keys_of_two_tenants_are_two_shards(mine: Any, theirs: Any) -> None:
    mine.put([key(1)], [b"mine"])
    assert theirs.get([key(1)]) == [None]
    theirs.put([key(1)], [b"theirs"])
    assert bytes(mine.get([key(1)])[0]) == b"mine"
    assert bytes(theirs.get([key(1)])[0]) == b"theirs"


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        ("match", node_pb2.MatchRequest, {}),
        ("acquire", node_pb2.AcquireRequest, {}),
        ("reserve", node_pb2.ReserveRequest, {"size_bytes": [10]}),
        ("pin", node_pb2.PinRequest, {}),
        ("unpin", node_pb2.UnpinRequest, {}),
        ("verify", node_pb2.VerifyRequest, {}),
        ("purge", node_pb2.PurgeRequest, {}),
    ],
)
def test_another_s_namespace_is_denied_even_to_who_knows_its_id(
    node: Node, theirs: Any, name: str, kind: Callable[..., Any], fields: dict[str, Any]
) -> None:
    theirs.put([key(1)], [b"theirs"])
    deadline_s = time.monotonic() + 10
    with contextlib.closing(Link(address(node, "unix"), "a", b"", deadline_s)) as link:
        request = kind(namespace_id=theirs.id, keys=[key(1)], **fields)
        with pytest.raises(Refused, match="not open in this session"):
            link.call(name, request, deadline_s)
        explain = node_pb2.ExplainRequest(key=key(1))
        assert not link.call("explain", explain, deadline_s).explain_response.events
    assert theirs.match([key(1)]).matched == 1


def test_another_s_segments_are_not_mapped(node: Node, theirs: Any) -> None:
    theirs.put([key(1)], [b"theirs"])
    segment = next(iter(core_of(node).shards)).extent.segment
    deadline_s = time.monotonic() + 10
    with contextlib.closing(Link(address(node, "unix"), "a", b"", deadline_s)) as link:
        with pytest.raises(Denied, match="not one of tenant 'a'"):
            link.map_segments({segment}, deadline_s)
        nobodys = max(core_of(node).extents.segments)
        with pytest.raises(Denied, match="not one of tenant 'a'"):
            link.map_segments({nobodys}, deadline_s)


def test_a_purge_without_namespace_spares_the_other_tenant(node: Node, theirs: Any) -> None:
    theirs.put([key(1)], [b"theirs"])
    deadline_s = time.monotonic() + 10
    with contextlib.closing(Link(address(node, "unix"), "a", b"", deadline_s)) as link:
        answer = link.call("purge", node_pb2.PurgeRequest(), deadline_s)
        assert answer.purge_response.shards == 0
    assert theirs.match([key(1)]).matched == 1


@pytest.mark.parametrize("call", ["get", "match"])
def test_memory_passes_to_another_tenant_only_when_it_is_unmapped_and_comes_zeroed(
    node: Node, mine: Any, theirs: Any, call: str
) -> None:
    count = MEMORY_BYTES // SEGMENT_BYTES
    secret = payload(3, SEGMENT_BYTES)
    for number in range(count):
        assert mine.put([key(number)], [secret]) == [Status.OK]
    mine.purge()
    assert theirs.put([key(1)], [payload(4, 100)]) == [Status.RETRY]

    getattr(mine, call)([key(0)])  # any answer names the retired segment
    assert theirs.put([key(1)], [payload(4, 100)]) == [Status.OK]
    [link] = theirs.client._links.values()
    [mapped] = link._segments.values()
    assert not np.frombuffer(mapped, np.uint8)[128:].any(), "the other's bytes are still there"
    assert core_of(node).books().quarantined_bytes == 0


def test_a_session_that_ends_gives_its_memory_to_the_next_tenant(node: Node, theirs: Any) -> None:
    with kvfabric_client.connect(address(node, "unix"), tenant="a") as client:
        room = client.open(A)
        for number in range(MEMORY_BYTES // SEGMENT_BYTES):
            room.put([key(number)], [payload(3, SEGMENT_BYTES)])
    # What it left is cold; nobody maps it any more once its connections are seen closed.
    until_s = time.monotonic() + 10
    while theirs.put([key(1)], [b"new"]) != [Status.OK]:
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_a_wrong_token_is_denied(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFABRIC_TOKEN", "right")
    guarded = start("guarded")
    with pytest.raises(Denied, match="token"):
        kvfabric_client.connect(address(guarded, "tcp"), token="wrong")
    with kvfabric_client.connect(address(guarded, "tcp"), token="right") as client:
        assert client.stats().node == "guarded"


def test_unmap_of_what_was_never_mapped_is_nothing(node: Node, mine: Any) -> None:
    mine.put([key(1)], [b"x"])
    deadline_s = time.monotonic() + 10
    with contextlib.closing(Link(address(node, "unix"), "a", b"", deadline_s)) as link:
        link.call("unmap", wire_pb2.UnmapRequest(segments=[1, 2, 99]), deadline_s)
    assert mine.get([key(1)]) != [None]


def test_whatever_another_tenant_knows_it_changes_and_learns_nothing(
    node: Node, theirs: Any
) -> None:
    """Every call of the protocol, with all the numbers that there are."""
    keys = [key(number) for number in range(1, 4)]
    theirs.put(keys, [payload(number, 1024) for number in range(1, 4)])
    name = bytes(32)
    owner = Link(address(node, "unix"), "b", b"", time.monotonic() + 30)

    def own(method: str, request: Any) -> Any:
        return getattr(owner.call(method, request, time.monotonic() + 30), f"{method}_response")

    with contextlib.closing(owner):
        owner.open(B, theirs.id, time.monotonic() + 30)
        opened = own(
            "open_sequence",
            node_pb2.OpenSequenceRequest(
                namespace_id=theirs.id, keys=keys[:1], size_bytes=1024, layers=1, block_tokens=16
            ),
        )
        epoch, number = opened.epoch, opened.sequence
        own("extend", node_pb2.ExtendRequest(sequence=number, epoch=epoch, blocks=1))
        fork = own("fork", node_pb2.ForkRequest(sequence=number, tokens=16, tentative=True))
        group = own(
            "open_group",
            node_pb2.OpenGroupRequest(namespace_id=theirs.id, keys=keys[:1] * 2, lengths=[1, 1]),
        )
        own("swap_state", node_pb2.SwapStateRequest(namespace_id=theirs.id, name=name, key=keys[0]))
        lease = own("acquire", node_pb2.AcquireRequest(namespace_id=theirs.id, keys=keys)).lease
        reserve = node_pb2.ReserveRequest(namespace_id=theirs.id, keys=[key(9)], size_bytes=[1024])
        reservation = own("reserve", reserve).reservation
        known: dict[str, Any] = {
            "namespace_id": theirs.id,
            "keys": keys[:1],
            "key": keys[0],
            "size_bytes": [1024],
            "sequence": number,
            "resume": number,
            "epoch": epoch,
            "settle": epoch,
            "fork": fork.sequence,
            "group": group.group,
            "name": name,
            "lease": lease,
            "leases": [lease],
            "reservation": reservation,
            "lengths": [1],
            "blocks": [0],
            "debtor": "n1",
            "creditor": "n1",
            "loan": 1,
        }

        def stands() -> tuple[object, ...]:
            core, sequence = core_of(node), node.sequences.all[number]
            session = sequence.session
            assert session is not None
            return (
                core.shards.count,
                core.pins,
                len(node.sequences.all),
                sequence.epoch,
                sequence.length,
                len(sequence.tails),
                len(node.groups.all),
                node.states.heads,
                [core.shards.claims(theirs.id, each) for each in keys],
                list(session.leases),
                list(session.reservations),
            )

        before = repr(stands())
        service = node_pb2.DESCRIPTOR.services_by_name["NodeService"]
        for method in service.methods:
            if method.name in ("Hello", "Read", "Write", "Stats", "ReportSteps"):
                continue
            call = re.sub("(?<!^)(?=[A-Z])", "_", method.name).lower()
            request = message_factory.GetMessageClass(method.input_type)()
            for field in method.input_type.fields:
                if field.name not in known:
                    continue
                value = known[field.name]
                if field.is_repeated:
                    getattr(request, field.name).extend(value if isinstance(value, list) else [])
                else:
                    value = value[0] if isinstance(value, list) else value
                    with contextlib.suppress(TypeError):
                        setattr(request, field.name, value)
            with contextlib.closing(Link(address(node, "unix"), "a", b"", _soon())) as link:
                try:
                    answer = link.call(call, request, _soon())
                except FabricError:
                    pass
                else:
                    body = getattr(answer, f"{call}_response")
                    assert not body.ByteSize(), f"{method.name} answers {body}"
            assert repr(stands()) == before, method.name


def _soon() -> float:
    return time.monotonic() + 10
