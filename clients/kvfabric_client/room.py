"""A room: all that a client does within one namespace. Batches answer per key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfabric.errors import Refused, Retry
from kvfabric.keys import namespace_id
from kvfabric.logs import guest_logger
from kvfabric.rpc.v1 import node_pb2, types_pb2
from kvfabric.types import BATCH_KEYS, Key, Namespace, Status, Tier
from kvfabric_client import shm, stream
from kvfabric_client.buffers import Bytes, Pieces
from kvfabric_client.deadline import Deadline, milliseconds
from kvfabric_client.link import Link

if TYPE_CHECKING:
    from kvfabric_client.client import Client

log = guest_logger(__name__)


class Room:
    """See the module. Made by `Client.open`."""

    def __init__(self, client: Client, namespace: Namespace) -> None:
        self.client = client
        self.namespace = namespace
        self.id = namespace_id(namespace)

    def match(
        self, keys: Sequence[Key], *, local_only: bool = False, timeout_s: float | None = None
    ) -> Match:
        """The longest prefix of `keys` that the fabric holds (the home node, if `local_only`)."""
        deadline = self.client.deadline(timeout_s)
        matched, runs = 0, list[Run]()
        for batch in _batches(len(keys)):
            request = node_pb2.MatchRequest(
                namespace_id=self.id, keys=keys[batch], local_only=local_only
            )
            answer = self._call("match", request, deadline).match_response
            runs += [Run(run.count, run.node, Tier(run.tier)) for run in answer.runs]
            matched += answer.matched
            if matched < batch.stop:
                break
        return Match(matched, tuple(runs))

    def put(
        self,
        keys: Sequence[Key],
        buffers: Sequence[Any],
        *,
        parents: Sequence[Key | None] | None = None,
        layers: int = 1,
        ttl_s: float = 0.0,
        timeout_s: float | None = None,
    ) -> list[Status]:
        """Stores shards: OK = sealed, EXISTS = was there, REFUSED and RETRY = not stored.

        `buffers[i]`: contiguous bytes, or a list of such that are stored one behind the
        other (one per layer, say). `layers`: equal layer parts of each shard, each with
        checksums of its own. `parents[i]`: the key before it in its chain. `ttl_s`: life
        after the commit; 0: until evicted.
        """
        deadline = self.client.deadline(timeout_s)
        sources = _pieces(keys, buffers)
        statuses: list[Status] = []
        for batch in _batches(len(keys)):
            some = parents[batch] if parents else None
            statuses += self._put(keys[batch], sources[batch], some, layers, ttl_s, deadline)
        return statuses

    def _put(
        self,
        keys: Sequence[Key],
        sources: Sequence[Pieces],
        parents: Sequence[Key | None] | None,
        layers: int,
        ttl_s: float,
        deadline: Deadline,
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

        statuses, reasons = self.client.at_home(store, deadline)
        why = {reasons[i] for i in reasons if statuses[i] is not Status.EXISTS}
        if why:
            refused = sum(status not in (Status.OK, Status.EXISTS) for status in statuses)
            log.warning("not_stored", shards=refused, why=sorted(why)[0], reasons=len(why))
        return statuses

    def get_into(
        self,
        keys: Sequence[Key],
        buffers: Sequence[Any],
        *,
        verify: bool = True,
        timeout_s: float | None = None,
    ) -> list[Status]:
        """Copies shards into `buffers` (as in `put`, writable): OK or MISS per key.

        A shard of another size than its buffers is a miss. Where the status is MISS, the
        buffers' content is undefined. After a return or a raise nothing writes to them.
        """
        deadline = self.client.deadline(timeout_s)
        targets = _pieces(keys, buffers, writable=True)
        return self._get(
            keys,
            lambda index, size: targets[index] if targets[index].size_bytes == size else None,
            deadline,
            verify=verify,
        )

    def get(
        self, keys: Sequence[Key], *, verify: bool = True, timeout_s: float | None = None
    ) -> list[Bytes | None]:
        """Copies of shards; None: a miss."""
        copies: list[Bytes | None] = [None] * len(keys)

        def target(index: int, size_bytes: int) -> Pieces:
            copies[index] = array = np.empty(size_bytes, dtype=np.uint8)
            return Pieces(array)

        statuses = self._get(keys, target, self.client.deadline(timeout_s), verify=verify)
        return [
            copy if status is Status.OK else None
            for copy, status in zip(copies, statuses, strict=True)
        ]

    def view(
        self, keys: Sequence[Key], *, lease_s: float = 30.0, timeout_s: float | None = None
    ) -> View:
        """Leased views of shards, for a `with` statement; not to be touched after its end.

        Without a copy where the home node shares its memory; what lies elsewhere is copied
        (and verified: a view itself is not).
        """
        deadline = self.client.deadline(timeout_s)

        def hold(link: Link) -> View:
            link.open(self.namespace, self.id, deadline.at_s)
            if not link.shares_memory:
                return View(self.client, link, shm.Held(0, [None] * len(keys), (), (), 0.0))
            held = shm.acquire(link, self.id, keys, lease_s, deadline, checked=False)
            return View(self.client, link, held)

        view = self.client.at_home(hold, deadline)
        missing = [index for index, place in enumerate(view) if place is None]
        if missing:
            try:
                some = [keys[index] for index in missing]
                left_s = deadline.left_s()
                for index, copy in zip(missing, self.get(some, timeout_s=left_s), strict=True):
                    view.add_copy(index, copy)
            except BaseException:
                view.release()
                raise
        return view

    def pin(self, keys: Sequence[Key], *, timeout_s: float | None = None) -> list[Status]:
        """Keeps shards of the home node until unpinned: OK or MISS per key."""
        request = node_pb2.PinRequest(namespace_id=self.id, keys=keys)
        answer = self._call("pin", request, self.client.deadline(timeout_s))
        return [Status(status) for status in answer.pin_response.statuses]

    def unpin(self, keys: Sequence[Key], *, timeout_s: float | None = None) -> list[Status]:
        request = node_pb2.UnpinRequest(namespace_id=self.id, keys=keys)
        answer = self._call("unpin", request, self.client.deadline(timeout_s))
        return [Status(status) for status in answer.unpin_response.statuses]

    def purge(
        self, keys: Sequence[Key] = (), *, owner: str = "", timeout_s: float | None = None
    ) -> tuple[int, int]:
        """Erases at the home node: (shards, bytes). No keys: the whole namespace."""
        request = node_pb2.PurgeRequest(namespace_id=self.id, keys=keys, owner=owner)
        answer = self._call("purge", request, self.client.deadline(timeout_s)).purge_response
        return answer.shards, answer.size_bytes

    def explain(self, key: Key, *, timeout_s: float | None = None) -> list[types_pb2.Event]:
        """What the home node remembers of a key's life, oldest first."""
        request = node_pb2.ExplainRequest(namespace_id=self.id, key=key)
        answer = self._call("explain", request, self.client.deadline(timeout_s))
        return list(answer.explain_response.events)

    def _call(self, name: str, request: Any, deadline: Deadline) -> Any:
        def call(link: Link) -> Any:
            link.open(self.namespace, self.id, deadline.at_s)
            return link.call(name, request, deadline.at_s)

        return self.client.at_home(call, deadline)

    def _get(
        self, keys: Sequence[Key], target: shm.Target, deadline: Deadline, *, verify: bool
    ) -> list[Status]:
        """From the home node, then from wherever the manager knows the rest."""
        statuses: list[Status] = []
        for batch in _batches(len(keys)):
            some = keys[batch]

            def place(index: int, size_bytes: int, start: int = batch.start) -> Pieces | None:
                return target(start + index, size_bytes)

            statuses += self.client.at_home(
                partial(self._read, keys=some, target=place, deadline=deadline, verify=verify),
                deadline,
            )
        missing = [index for index, status in enumerate(statuses) if status is not Status.OK]
        for batch in _batches(len(missing)) if missing else ():
            some = [keys[index] for index in missing[batch]]
            places = self.client.elsewhere(self.id, some, deadline)
            for address, positions in places.items():
                indices = [missing[batch][position] for position in positions]
                found = self._read_at(address, keys, indices, target, deadline, verify=verify)
                for index, status in zip(indices, found, strict=True):
                    statuses[index] = status
        return statuses

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


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbours of a matched prefix that lie in the same place."""

    count: int
    node: str
    tier: Tier


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefix of the asked keys that the fabric holds."""

    matched: int
    runs: tuple[Run, ...]


class View:
    """Leased bytes per key: index it, iterate over it; None is a miss."""

    def __init__(self, client: Client, link: Link, held: shm.Held) -> None:
        self._client = client
        self._link = link
        self._lease = held.lease
        # A shard is sealed: whoever wrote into it would spoil it for all others.
        self._views = [None if place is None else place.toreadonly() for place in held.places]
        self.lease_s = held.lease_s

    def add_copy(self, index: int, copy: Bytes | None) -> None:
        """A private copy for a key that the home node does not hold."""
        self._views[index] = None if copy is None else copy.data.toreadonly()

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: int) -> memoryview | None:
        return self._views[index]

    def __iter__(self) -> Iterator[memoryview | None]:
        return iter(self._views)

    def alive(self) -> bool:
        """Whether the node still keeps these bytes. Once false, they may be anything."""
        return self._link.alive()

    def renew(self, lease_s: float = 30.0) -> None:
        """Prolongs the lease. Refused where it has expired, Unreachable where the node died."""
        if self._lease:
            request = node_pb2.RenewRequest(lease=self._lease, lease_ms=milliseconds(lease_s))
            answer = self._link.call("renew", request, self._client.deadline(None).at_s)
            self.lease_s = answer.renew_response.lease_ms / 1000

    def release(self) -> None:
        """Ends the lease. Safe to repeat."""
        lease, self._lease = self._lease, 0
        self._views = []
        if lease:
            self._link.release(lease)

    def __enter__(self) -> View:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _batches(count: int) -> list[slice]:
    """What one call takes after the other; one, where there is nothing."""
    starts = range(0, count, BATCH_KEYS) or (0,)
    return [slice(start, min(start + BATCH_KEYS, count)) for start in starts]


def _pieces(keys: Sequence[Key], buffers: Sequence[Any], *, writable: bool = False) -> list[Pieces]:
    if len(keys) != len(buffers):
        raise Refused(f"{len(keys)} keys with {len(buffers)} buffers; give one per key")
    return [Pieces(buffer, writable=writable) for buffer in buffers]
