"""Bytes of one namespace in and out: to a node, from the node that is asked first, from others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from kvfabric.errors import Retry
from kvfabric.keys import namespace_id
from kvfabric.logs import guest_logger
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import BATCH_KEYS, Key, Namespace, Status
from kvfabric_client import shm, stream
from kvfabric_client.buffers import Pieces
from kvfabric_client.deadline import Deadline, milliseconds
from kvfabric_client.link import Link

if TYPE_CHECKING:
    from kvfabric_client.client import Client

log = guest_logger(__name__)

T = TypeVar("T")

ROUNDS = 3  # places asked for: a replica may go, or its node may die, before it is read


class Transfers:
    """What a `Room` stands on."""

    def __init__(self, client: Client, namespace: Namespace) -> None:
        self.client = client
        self.namespace = namespace
        self.id = namespace_id(namespace)

    def with_node(self, at: str, call: Callable[[Link], T], deadline: Deadline) -> T:
        """Runs `call` with the node at this address, or with the home node."""
        if at:
            return self.client.at(at, call, deadline)
        return self.client.at_home(call, deadline)

    def store(
        self,
        keys: Sequence[Key],
        sources: Sequence[Pieces],
        parents: Sequence[Key | None] | None,
        layers: int,
        ttl_s: float,
        deadline: Deadline,
        at: str,
    ) -> list[Status]:
        header: dict[str, Any] = {
            "namespace_id": self.id,
            "keys": keys,
            "parents": [parent or b"" for parent in parents or ()],
            "size_bytes": [source.size_bytes for source in sources],
            "layers": layers,
            "ttl_ms": milliseconds(ttl_s),
        }

        def store(link: Link) -> tuple[list[Status], dict[int, str]]:
            link.open(self.namespace, self.id, deadline.at_s)
            header["deadline_ms"] = milliseconds(deadline.left_s())
            checked = self.client.checksums
            if link.shares_memory:
                request = node_pb2.ReserveRequest(**header)
                return shm.put(
                    link, request, sources, deadline, self.client.copiers, checked=checked
                )
            stream_header = node_pb2.WriteRequest.Header(**header)
            return stream.put(link, stream_header, sources, deadline, checked=checked)

        statuses, reasons = self.with_node(at, store, deadline)
        why = {reasons[i] for i in reasons if statuses[i] is not Status.EXISTS}
        if why:
            refused = sum(status not in (Status.OK, Status.EXISTS) for status in statuses)
            log.warning("not_stored", shards=refused, why=sorted(why)[0], reasons=len(why))
        return statuses

    def load(
        self,
        keys: Sequence[Key],
        target: shm.Target,
        deadline: Deadline,
        *,
        verify: bool,
        at: str = "",
    ) -> list[Status]:
        """From the node that is named, the home node, then from wherever the manager knows."""
        statuses = [Status.MISS] * len(keys)

        def read_at(address: str, indices: Sequence[int]) -> None:
            found = self._read_at(address, keys, indices, target, deadline, verify=verify)
            for index, status in zip(indices, found, strict=True):
                statuses[index] = status

        for batch in batches(len(keys)) if at else ():
            read_at(at, range(batch.start, batch.stop))
        missing = _missing(statuses)
        for batch in batches(len(missing)) if missing or not keys else ():
            some = missing[batch]

            def place(index: int, size_bytes: int, some: list[int] = some) -> Pieces | None:
                return target(some[index], size_bytes)

            read = partial(
                self._read,
                keys=[keys[index] for index in some],
                target=place,
                deadline=deadline,
                verify=verify,
            )
            found = self.client.at_home(read, deadline)
            for index, status in zip(some, found, strict=True):
                statuses[index] = status
        tried: dict[int, set[str]] = {}
        for _ in range(ROUNDS):
            missing = _missing(statuses)
            if not missing:
                break
            places = self._places(keys, missing, deadline, tried)
            for address, indices in places.items():
                for index in indices:
                    tried.setdefault(index, set()).add(address)
                read_at(address, indices)
            if not places:
                break
        return statuses

    def _places(
        self,
        keys: Sequence[Key],
        missing: Sequence[int],
        deadline: Deadline,
        tried: Mapping[int, set[str]],
    ) -> dict[str, list[int]]:
        """Where the manager knows these to be: indices by the address of a node."""
        found: dict[str, list[int]] = {}
        for batch in batches(len(missing)):
            some = missing[batch]
            vain = [tried.get(index, set()) for index in some]
            wanted = [keys[index] for index in some]
            places = self.client.elsewhere(self.id, wanted, deadline, vain)
            for address, positions in places.items():
                found.setdefault(address, []).extend(some[position] for position in positions)
        return found

    def _read_at(
        self,
        address: str,
        keys: Sequence[Key],
        indices: Sequence[int],
        target: shm.Target,
        deadline: Deadline,
        *,
        verify: bool,
    ) -> list[Status]:
        """Reads some of the keys from a node; one that cannot answer now holds none of them."""
        some = [keys[index] for index in indices]

        def read(link: Link) -> list[Status]:
            return self._read(
                link, some, lambda i, size: target(indices[i], size), deadline, verify=verify
            )

        try:
            return self.client.at(address, read, deadline)
        except Retry as error:
            log.warning("node_unreachable", address=address, why=str(error))
            return [Status.MISS] * len(indices)

    def _read(
        self,
        link: Link,
        keys: Sequence[Key],
        target: shm.Target,
        deadline: Deadline,
        *,
        verify: bool,
    ) -> list[Status]:
        link.open(self.namespace, self.id, deadline.at_s)
        checked = verify and self.client.checksums
        if link.shares_memory:
            copiers = self.client.copiers
            statuses, damaged = shm.get(
                link, self.id, keys, target, deadline, copiers, checked=checked
            )
        else:
            statuses, damaged = stream.get(link, self.id, keys, target, deadline, checked=checked)
        if damaged:
            names = [keys[index].hex()[:16] for index in damaged]
            log.error("damaged", node=link.node, keys=names, effect="missed, and reported")
            request = node_pb2.VerifyRequest(
                namespace_id=self.id, keys=[keys[index] for index in damaged]
            )
            link.call("verify", request, deadline.at_s)
        return statuses


def batches(count: int) -> list[slice]:
    """What one call takes after the other; one, where there is nothing."""
    starts = range(0, count, BATCH_KEYS) or (0,)
    return [slice(start, min(start + BATCH_KEYS, count)) for start in starts]


def _missing(statuses: Sequence[Status]) -> list[int]:
    return [index for index, status in enumerate(statuses) if status is not Status.OK]
