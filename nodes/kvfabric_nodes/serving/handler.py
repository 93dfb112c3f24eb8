"""NodeService's calls, whichever way they came: one handler for wire and gRPC.

It checks what the messages say, asks the core, and fills in the answer. It runs on
the core's thread. Calls that read payload bytes (commit, verify) or ask the manager
(match) answer a coroutine, all others are done when they return.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol

from kvfabric import checksums
from kvfabric.clock import Clock
from kvfabric.errors import Denied, Refused, Unsupported
from kvfabric.keys import namespace_id
from kvfabric.rpc.v1 import node_pb2, types_pb2, wire_pb2
from kvfabric.types import (
    DEFAULT_TENANT,
    DIGEST_BYTES,
    PROTOCOL_VERSION,
    Key,
    Namespace,
    NamespaceId,
    Status,
)
from kvfabric.wire.frames import MAX_HEADER_BYTES
from kvfabric_nodes.metrics import NodeMetrics
from kvfabric_nodes.store.arena import Arena
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.filling import Fill
from kvfabric_nodes.store.promises import Grant, Lease, Reservation, Session
from kvfabric_nodes.store.shards import Shard

MIN_VERSION = 1
DEFAULT_DEADLINE_S = 30.0
MAX_NAMESPACES = 1024  # per session
MAX_LAYERS = 4096  # per shard
MAX_ENDED_SESSIONS = 1024  # per hello
MAX_REASONS = 256  # per answer
PUT_ROOM_S = 1.0  # how long a put waits for room that is sought on other nodes
PLACE_BYTES = 48  # at most, of one key in an AcquireResponse without its checksums
# Below this a commit's checksums cost less than handing them to another thread.
INLINE_VERIFY_BYTES = 256 << 10

FEATURES = frozenset({"shm", "bulk", "unchecked"})

Locate = Callable[[NamespaceId, Sequence[Key]], Awaitable[Sequence[node_pb2.MatchResponse.Run]]]
"""Asks the manager where the first of these keys lie, up to the first that no node holds."""

MakeRoom = Callable[[str, int, int, float], Awaitable[bool]]
"""Seeks room for a tenant's blocks on other nodes, where all that is here is needed: tenant, size
of a block, how many, and for how many seconds. True: room came free, so reserve again."""

Call = Callable[[Session, Any, Any], Coroutine[Any, Any, None] | None]
"""Session, request and response; a coroutine where the answer takes a while."""


Taker = Callable[[socket.socket, wire_pb2.Frame, Session, Any, str], None]
"""Serves a connection in a thread of its own, from the answer to its hello on, which it sends
itself: socket, answer, session, server, and whether it is unix or tcp."""


class GuestBook(Protocol):
    """What the next start of this node has to know of its clients: who maps which segments, and
    what they erased. Sessions go by their tokens.
    """

    def mapped(self, token: bytes, pid: int, segments: Sequence[int]) -> None:
        """To be called before a process is given them; it is recorded when this returns."""

    def unmapped(self, token: bytes, segments: Sequence[int]) -> None: ...
    def ended(self, token: bytes) -> None: ...
    def ended_before(self, tokens: Sequence[bytes]) -> None:
        """Sessions of an earlier start of which nothing touches memory any more."""

    def erased(self) -> None:
        """Nothing that was purged may come back once this returns."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this node is, for its answers."""

    node: str
    token: bytes = b""
    manager: str = ""


class Handler:
    """See the module."""

    def __init__(
        self,
        core: NodeCore,
        arena: Arena,
        clock: Clock,
        identity: Identity,
        verifier: Executor,
        metrics: NodeMetrics,
        locate: Locate | None = None,
    ) -> None:
        self.core = core
        self.arena = arena
        self.clock = clock
        self.identity = identity
        self.locate = locate
        self.guests: GuestBook | None = None
        self.make_room: MakeRoom | None = None
        self.metrics = metrics
        self.takers: dict[str, Taker] = {}  # of connections, by the feature that asks for it
        self.peer_token = b""  # what other nodes show; empty: nobody is one
        self._verifier = verifier
        self._calls: dict[str, Call] = {
            "match": self.match,
            "reserve": self.reserve,
            "commit": self.commit,
            "abort": self.abort,
            "acquire": self.acquire,
            "renew": self.renew,
            "release": self.release,
            "pin": self.pin,
            "unpin": self.unpin,
            "verify": self.verify,
            "purge": self.purge,
            "stats": self.stats,
            "explain": self.explain,
        }

    def offer(self, calls: Mapping[str, Call]) -> None:
        """Takes in further calls, by their names in lower case."""
        self._calls.update(calls)

    def call(
        self, name: str, session: Session, request: Any, response: Any
    ) -> Coroutine[Any, Any, None] | None:
        """Carries out one call by its name in lower case."""
        method = self._calls.get(name)
        if method is None:
            raise Refused(f"{name!r} cannot be called on this kind of connection")
        started_s = self.clock.now()
        self.core.tick(started_s)
        later = method(session, request, response)
        self.metrics.call_seconds(name).observe(self.clock.now() - started_s)
        return later

    # Sessions -----------------------------------------------------------------------

    def hello(
        self,
        session: Session | None,
        request: node_pb2.HelloRequest,
        response: node_pb2.HelloResponse,
        offered: frozenset[str] = FEATURES,
    ) -> Session:
        """Opens a session, or adds namespaces to one. `offered`: what this transport can."""
        self._negotiate(request)
        between_nodes = bool(request.peer_token)
        tenant, _, _ = (request.principal or DEFAULT_TENANT).partition("/")
        if between_nodes:
            tenant = ""  # no client's
        features = sorted(offered & set(request.features))
        ids = [self._namespace(space, tenant) for space in request.namespaces]
        if session is not None and session.between_nodes and not between_nodes:
            raise Denied("this session is another node's; show its peer_token")
        if session is not None and session.tenant != tenant:
            raise Denied(f"this session belongs to tenant {session.tenant!r}, not {tenant!r}")
        if len(set(ids).union(session.namespaces if session else ())) > MAX_NAMESPACES:
            raise Refused(f"more than {MAX_NAMESPACES} namespaces in one session; open another")
        if session is None:
            session = self.core.open_session(
                tenant,
                request.principal or DEFAULT_TENANT,
                checked="unchecked" not in features,
                shares_memory="shm" in offered and not between_nodes,
            )
            session.between_nodes = between_nodes
        self.core.open_namespaces(session, ids)
        if self.guests is not None and request.ended_sessions:
            self.guests.ended_before(request.ended_sessions[:MAX_ENDED_SESSIONS])
        response.version = min(PROTOCOL_VERSION, request.max_version)
        response.node = self.identity.node
        response.incarnation = self.metrics.incarnation
        response.namespace_ids.extend(ids)
        response.features.extend(features)
        response.max_shard_bytes = self.core.extents.segment_bytes
        response.max_batch = self.core.limits.batch_keys
        response.max_deadline_ms = int(self.core.limits.deadline_s * 1000)
        response.manager = self.identity.manager
        return session

    def _negotiate(self, request: node_pb2.HelloRequest) -> None:
        if request.max_version < MIN_VERSION or request.min_version > PROTOCOL_VERSION:
            raise Unsupported(
                f"{request.client or 'the client'} speaks protocol {request.min_version} to "
                f"{request.max_version}, this node {MIN_VERSION} to {PROTOCOL_VERSION}; "
                "bring the older one up to date"
            )
        if request.peer_token:
            if not (self.peer_token and hmac.compare_digest(request.peer_token, self.peer_token)):
                raise Denied(
                    "wrong peer_token, or this node has none yet: nodes of one fabric get it from "
                    "their manager when they register"
                )
        elif not hmac.compare_digest(request.token, self.identity.token):
            raise Denied("wrong or missing token; set KVFABRIC_TOKEN to the node's")

    def _namespace(self, space: types_pb2.Namespace, tenant: str) -> NamespaceId:
        if space.tenant != tenant:
            raise Denied(f"tenant {tenant!r} cannot open a namespace of tenant {space.tenant!r}")
        return namespace_id(Namespace(space.tenant, space.fingerprint, space.salt))

    # Writing ------------------------------------------------------------------------

    def reserve(
        self,
        session: Session,
        request: node_pb2.ReserveRequest | node_pb2.WriteRequest.Header,
        response: node_pb2.ReserveResponse,
    ) -> Coroutine[Any, Any, None] | None:
        reservation, grants = self.reserve_extents(session, request)
        if self.may_borrow(grants):
            if reservation is not None:
                self.core.abort(reservation)  # there may be no later
            return self._reserve_later(session, request, grants, response)
        self._answer_reserve(request, reservation, grants, response)
        return None

    async def _reserve_later(
        self,
        session: Session,
        request: node_pb2.ReserveRequest | node_pb2.WriteRequest.Header,
        grants: list[Grant],
        response: node_pb2.ReserveResponse,
    ) -> None:
        reservation, grants = await self.reserve_again(session, request, None, grants)
        self._answer_reserve(request, reservation, grants, response)

    def may_borrow(self, grants: Iterable[Grant]) -> bool:
        """Whether there was no room because what is here is needed, and others may have some."""
        return (
            self.make_room is not None
            and self.core.shards.any_claims
            and not self.core.draining
            and any(grant.status is Status.RETRY for grant in grants)
        )

    async def reserve_again(
        self,
        session: Session,
        request: node_pb2.ReserveRequest | node_pb2.WriteRequest.Header,
        reservation: Reservation | None,
        grants: list[Grant],
        *,
        streamed: bool = False,
    ) -> tuple[Reservation | None, list[Grant]]:
        """What open sequences need is lent out to make room, where other nodes have some."""
        assert self.make_room is not None
        if reservation is not None:
            self.core.abort(reservation)  # nobody knows of it yet
        full = [i for i, grant in enumerate(grants) if grant.status is Status.RETRY]
        sizes = list(request.size_bytes)
        size_bytes = max(sizes[i] for i in full) if len(sizes) > 1 else sizes[0]
        await self.make_room(session.tenant, size_bytes, len(full), PUT_ROOM_S)
        if session.id not in self.core.sessions:
            raise Refused("the session ended while room was sought")
        return self.reserve_extents(session, request, streamed=streamed)

    def _answer_reserve(
        self,
        request: node_pb2.ReserveRequest | node_pb2.WriteRequest.Header,
        reservation: Reservation | None,
        grants: list[Grant],
        response: node_pb2.ReserveResponse,
    ) -> None:
        response.reservation = reservation.id if reservation else 0
        response.deadline_ms = int(self.core.bounded(seconds(request.deadline_ms)) * 1000)
        response.statuses.extend([grant.status for grant in grants])
        extents = [grant.extent for grant in grants]
        response.segments.extend([e.segment if e else 0 for e in extents])
        response.offsets.extend([e.offset if e else 0 for e in extents])
        response.generations.extend([e.generation if e else 0 for e in extents])
        put_reasons(response.reasons, enumerate(grants))

    def reserve_extents(
        self,
        session: Session,
        request: node_pb2.ReserveRequest | node_pb2.WriteRequest.Header,
        *,
        streamed: bool = False,
    ) -> tuple[Reservation | None, list[Grant]]:
        keys = checked_keys(request.keys)
        checked_keys([parent for parent in request.parents if parent])
        parents: list[Key | None] = [Key(p) if p else None for p in request.parents]
        sizes = list(request.size_bytes)
        if len(sizes) == 1:
            sizes *= len(keys)
        if len(sizes) != len(keys) or len(parents) not in (0, len(keys)):
            raise Refused(
                f"{len(keys)} keys with {len(sizes)} sizes and {len(parents)} parents; "
                "give one size or one per key, and no parents or one per key"
            )
        layers = request.layers or 1
        if layers > MAX_LAYERS:
            raise Refused(f"{layers} layers in a shard; the limit is {MAX_LAYERS}")
        for size_bytes in set(sizes):
            if size_bytes <= self.core.extents.segment_bytes:  # else the core refuses it
                checksums.parts(size_bytes, layers)  # refuses what cannot be cut
        grants = self.core.reserve(
            session,
            NamespaceId(request.namespace_id),
            keys,
            parents or [None] * len(keys),
            sizes,
            layers,
            seconds(request.deadline_ms),
            request.ttl_ms / 1000,
            self.clock.now(),
            streamed=streamed,
        )
        self.renew_memory()
        return grants

    def commit(
        self,
        session: Session,
        request: node_pb2.CommitRequest,
        response: node_pb2.CommitResponse,
    ) -> Coroutine[Any, Any, None] | None:
        reservation = self.core.reservation(session, request.reservation)
        indices = list(request.indices) or sorted(reservation.items)
        self._count_filled(reservation, indices)
        fills, refused = self._fills(session, reservation, indices, list(request.checksums))
        if not session.checked or sum(len(f.view) for f in fills) <= INLINE_VERIFY_BYTES:
            wrong = {} if not session.checked else {f.index: f.wrong() for f in fills}
            grants = self.settle(reservation, fills, wrong) | refused
            self._answer_commit(indices, grants, response)
            return None
        return self._verify_and_commit(reservation, indices, fills, refused, response)

    def _count_filled(self, reservation: Reservation, indices: Sequence[int]) -> None:
        """Counts what came by shared memory; the time since the last commit is its filling."""
        now_s = self.clock.now()
        sizes = [reservation.items[i].size_bytes for i in indices if i in reservation.items]
        self.metrics.written["shm"].add(sum(sizes), now_s - reservation.filling_since_s)
        reservation.filling_since_s = now_s

    async def _verify_and_commit(
        self,
        reservation: Reservation,
        indices: list[int],
        fills: list[Fill],
        refused: dict[int, Grant],
        response: node_pb2.CommitResponse,
    ) -> None:
        loop = asyncio.get_running_loop()
        wrong = await loop.run_in_executor(
            self._verifier, lambda: {fill.index: fill.wrong() for fill in fills}
        )
        self.core.tick(self.clock.now())
        self._answer_commit(indices, self.settle(reservation, fills, wrong) | refused, response)

    def _fills(
        self,
        session: Session,
        reservation: Reservation,
        indices: Sequence[int],
        sums: list[int],
    ) -> tuple[list[Fill], dict[int, Grant]]:
        """What the client says it filled; a checksum column of wrong length frees them all."""
        now_s = self.clock.now()
        refused: dict[int, Grant] = {}
        items = {i: reservation.items[i] for i in indices if i in reservation.items}
        for index in indices:
            if index not in items:
                self.metrics.refusals["state"] += 1
                refused[index] = Grant(
                    Status.REFUSED, reason="was not granted, or is settled already"
                )
        counts = {
            i: len(checksums.parts(item.size_bytes, reservation.layers))
            for i, item in items.items()
        }
        wanted = sum(counts.values())
        if session.checked and len(sums) != wanted:
            reason = (
                f"the commit brings {len(sums)} checksums for layer parts of {len(items)} keys "
                f"that need {wanted}: a length or the number of layers is wrong"
            )
            for index in items:
                self.metrics.refusals["length"] += 1
                refused[index] = self.core.reject(reservation, index, reason, now_s)
            return [], refused
        fills: list[Fill] = []
        start = 0
        for index, item in items.items():
            view = self.arena.view(item.extent.segment, item.extent.offset, item.size_bytes)
            expected = sums[start : start + counts[index]] if session.checked else ()
            start += counts[index]
            fills.append(Fill(index, view, reservation.layers, expected))
        return fills, refused

    def settle(
        self, reservation: Reservation, fills: Sequence[Fill], wrong: dict[int, str]
    ) -> dict[int, Grant]:
        """Seals what was filled right, frees what was not."""
        now_s = self.clock.now()
        grants: dict[int, Grant] = {}
        for fill in fills:
            reason = wrong.get(fill.index)
            if reason:
                self.metrics.mismatches["commit"] += 1
                self.metrics.refusals["checksum"] += 1
                grants[fill.index] = self.core.reject(reservation, fill.index, reason, now_s)
                continue
            grant = self.core.seal(reservation, fill.index, fill.expected, now_s)
            if grant.status is Status.REFUSED:
                self.metrics.refusals["deadline"] += 1
            grants[fill.index] = grant
        return grants

    def _answer_commit(
        self, indices: list[int], grants: dict[int, Grant], response: node_pb2.CommitResponse
    ) -> None:
        response.statuses.extend([grants[i].status for i in indices])
        put_reasons(response.reasons, ((i, grants[i]) for i in indices))

    def abort(
        self, session: Session, request: node_pb2.AbortRequest, response: node_pb2.AbortResponse
    ) -> None:
        reservation = self.core.reservation(session, request.reservation)
        self.core.abort(reservation, request.indices)

    def close_session(self, session: Session) -> None:
        """Takes back all it held, once nobody touches it any more."""
        self.core.close_session(session, self.clock.now())
        self.renew_memory()

    def renew_memory(self) -> None:
        """Gives the segments that the core has recycled their fresh memory."""
        while self.core.recycled:
            self.arena.replace(*self.core.recycled.pop(0))

    # Reading ------------------------------------------------------------------------

    def match(
        self, session: Session, request: node_pb2.MatchRequest, response: node_pb2.MatchResponse
    ) -> Coroutine[Any, Any, None] | None:
        namespace = NamespaceId(request.namespace_id)
        keys = checked_keys(request.keys)
        matched = self.core.match(session, namespace, keys)
        response.matched = matched
        if matched:
            run = response.runs.add()
            run.count = matched
            run.node = self.identity.node
            run.tier = types_pb2.TIER_DRAM
            run.incarnation = self.metrics.incarnation
        if matched == len(keys) or request.local_only or self.locate is None:
            return None
        return self._match_elsewhere(self.locate, namespace, keys[matched:], response)

    async def _match_elsewhere(
        self,
        locate: Locate,
        namespace: NamespaceId,
        keys: Sequence[Key],
        response: node_pb2.MatchResponse,
    ) -> None:
        """One question to the manager for all the rest; without an answer the rest is a miss."""
        for run in await locate(namespace, keys):
            response.runs.append(run)
            response.matched += run.count

    def acquire(
        self, session: Session, request: node_pb2.AcquireRequest, response: node_pb2.AcquireResponse
    ) -> None:
        lease_s = seconds(request.lease_ms)
        lease, found = self.core.acquire(
            session,
            NamespaceId(request.namespace_id),
            checked_keys(request.keys),
            lease_s,
            self.clock.now(),
        )
        response.lease_ms = int(self.core.bounded(lease_s) * 1000)
        if lease is None:
            response.statuses.extend([_MISS] * len(found))
            return
        response.lease = lease.id
        statuses, segments, offsets, sizes, generations = zip(*map(_row, found), strict=True)
        response.statuses.extend(statuses)
        response.segments.extend(segments)
        response.offsets.extend(offsets)
        response.size_bytes.extend(sizes)
        response.generations.extend(generations)
        if not request.without_checksums:
            response.layers.extend([s.layers if s else 0 for s in found])
            for shard in lease.shards:
                response.checksums.extend(shard.checksums)
        if len(found) * PLACE_BYTES + len(response.checksums) * 8 > MAX_HEADER_BYTES:
            self.core.release(session, [lease.id])
            raise Refused(
                f"{len(found)} shards have {len(response.checksums)} checksums, more than one "
                "answer can tell; use smaller batches"
            )

    def renew(
        self, session: Session, request: node_pb2.RenewRequest, response: node_pb2.RenewResponse
    ) -> None:
        lease_s = seconds(request.lease_ms)
        self.core.renew(session, request.lease, lease_s, self.clock.now())
        response.lease_ms = int(self.core.bounded(lease_s) * 1000)

    def release(
        self, session: Session, request: node_pb2.ReleaseRequest, response: node_pb2.ReleaseResponse
    ) -> None:
        self.end_leases(session, request.leases)

    def end_leases(self, session: Session, leases: Iterable[int]) -> None:
        """The reader has let go of these."""
        now_s = self.clock.now()
        held = session.leases
        own = [i for i in leases if i in held and not held[i].streamed]  # a stream ends its own
        for lease in self.core.release(session, own):
            self.metrics.read["shm"].add(lease.size_bytes, now_s - lease.granted_s)

    async def verify(
        self, session: Session, request: node_pb2.VerifyRequest, response: node_pb2.VerifyResponse
    ) -> None:
        namespace = NamespaceId(request.namespace_id)
        now_s = self.clock.now()
        lease, found = self.core.acquire(
            session,
            namespace,
            checked_keys(request.keys),
            DEFAULT_DEADLINE_S,
            now_s,
            streamed=True,
        )
        try:
            loop = asyncio.get_running_loop()
            damaged = await loop.run_in_executor(
                self._verifier, lambda: [s for s in found if s and not self._intact(s)]
            )
        finally:
            if lease is not None:
                self.core.release(session, [lease.id])
        for shard in dict.fromkeys(damaged):
            self.metrics.mismatches["verify"] += 1
            if shard.present:
                why = "its bytes no longer have their checksums"
                self.core.drop(shard, "dropped", why, self.clock.now())
        response.statuses.extend(
            [Status.OK if shard and shard not in damaged else Status.MISS for shard in found]
        )

    def _intact(self, shard: Shard) -> bool:
        view = self.arena.view(shard.extent.segment, shard.extent.offset, shard.size_bytes)
        return not shard.layers or checksums.matches(view, shard.layers, shard.checksums)

    # Keeping, erasing, telling ---------------------------------------------------------

    def pin(
        self, session: Session, request: node_pb2.PinRequest, response: node_pb2.PinResponse
    ) -> None:
        namespace = NamespaceId(request.namespace_id)
        response.statuses.extend(self.core.pin(session, namespace, checked_keys(request.keys)))

    def unpin(
        self, session: Session, request: node_pb2.UnpinRequest, response: node_pb2.UnpinResponse
    ) -> None:
        namespace = NamespaceId(request.namespace_id)
        keys = checked_keys(request.keys)
        response.statuses.extend(self.core.unpin(session, namespace, keys, self.clock.now()))

    def purge(
        self, session: Session, request: node_pb2.PurgeRequest, response: node_pb2.PurgeResponse
    ) -> None:
        namespace = NamespaceId(request.namespace_id)
        spaces = [namespace] if namespace else sorted(self.core.namespaces_of(session.tenant))
        if not namespace and request.keys:
            raise Refused("keys to purge need their namespace_id")
        for space in spaces:
            shards, size_bytes = self.core.purge(
                session, space, checked_keys(request.keys), request.owner, self.clock.now()
            )
            response.shards += shards
            response.size_bytes += size_bytes
        if self.guests is not None:
            self.guests.erased()

    def stats(
        self, session: Session, request: node_pb2.StatsRequest, response: node_pb2.StatsResponse
    ) -> None:
        response.stats.CopyFrom(self.metrics.stats())

    def explain(
        self, session: Session, request: node_pb2.ExplainRequest, response: node_pb2.ExplainResponse
    ) -> None:
        spaces = self.core.namespaces_of(session.tenant)
        if request.namespace_id:
            self.core.admit(session, NamespaceId(request.namespace_id), 1)
            spaces = frozenset({NamespaceId(request.namespace_id)})
        now_s = self.clock.now()
        for decision in self.core.story.tell(spaces, request.key):
            event = response.events.add()
            event.age_ms = int((now_s - decision.at_s) * 1000)
            event.node = self.identity.node
            event.what = decision.what
            event.why = decision.why


_OK, _MISS = int(Status.OK), int(Status.MISS)


def _row(shard: Shard | None) -> tuple[int, int, int, int, int]:
    """Status, segment, offset, size and generation of one key of an acquire."""
    if shard is None:
        return (_MISS, 0, 0, 0, 0)
    extent = shard.extent
    return (_OK, extent.segment, extent.offset, shard.size_bytes, extent.generation)


def seconds(deadline_ms: int) -> float:
    return deadline_ms / 1000 if deadline_ms else DEFAULT_DEADLINE_S


def checked_keys(raw: Sequence[bytes]) -> list[Key]:
    keys: list[Any] = list(raw)
    if set(map(len, keys)) - {DIGEST_BYTES}:
        key = next(key for key in keys if len(key) != DIGEST_BYTES)
        raise Refused(f"key {key.hex()[:80]!r} has {len(key)} bytes; a key has {DIGEST_BYTES}")
    return keys


def put_reasons(reasons: Any, grants: Iterable[tuple[int, Grant]]) -> None:
    """The first reasons of a batch: with one for each of thousands it would fit no answer."""
    given = ((index, grant.reason) for index, grant in grants if grant.reason)
    for index, reason in itertools.islice(given, MAX_REASONS):
        reasons[index] = reason


def put_verdicts(response: node_pb2.WriteResponse, grants: list[Grant], *, last: bool) -> None:
    """The verdicts on a streamed write: the grants at first, what became of them at last."""
    response.statuses.extend([grant.status for grant in grants])
    put_reasons(response.reasons, enumerate(grants))
    response.last = last


def put_header(
    header: node_pb2.ReadResponse.Header,
    found: list[Shard | None],
    lease: Lease | None,
    session: Session,
    now_s: float,
) -> None:
    """What a streamed read is about to send; to another node also what a replica must know."""
    header.statuses.extend([Status.OK if shard else Status.MISS for shard in found])
    header.size_bytes.extend([shard.size_bytes if shard else 0 for shard in found])
    header.layers.extend([shard.layers if shard else 0 for shard in found])
    for shard in lease.shards if lease else ():
        header.checksums.extend(shard.checksums)
    if session.between_nodes:
        header.tenant = next((shard.pool[0] for shard in found if shard), "")
        header.parents.extend([(shard.parent or b"") if shard else b"" for shard in found])
        header.owners.extend([shard.owner if shard else "" for shard in found])
        header.ttl_ms.extend([_left_ms(shard, now_s) if shard else 0 for shard in found])


def _left_ms(shard: Shard, now_s: float) -> int:
    """What is left of its time to live; 0: it has none."""
    if shard.expires_s is None:
        return 0
    return max(1, int((shard.expires_s - now_s) * 1000))
