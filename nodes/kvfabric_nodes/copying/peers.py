"""Sessions with other nodes: calls with deadlines in a few threads, and connections for bulk.

A session's first connection carries no calls, so that a failed call does not cost it. A
node on the same host is spoken to over its unix socket, any other one over TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from google.protobuf.message import Message

from kvfabric.errors import DeadlineExceeded, FabricError, Refused, Retry, Unreachable
from kvfabric.rpc.v1 import node_pb2, types_pb2
from kvfabric.types import PROTOCOL_VERSION
from kvfabric.wire import sockets
from kvfabric.wire.connection import Connection
from kvfabric.wire.frames import MAX_HEADER_BYTES

CALL_THREADS = 8
CALLS_PER_NODE = 2  # at once: a node that does not answer must not keep all threads
MAX_WAITING_CALLS = 256
MAX_SESSIONS = 256
CONNECT_TIMEOUT_S = 2.0
AWAY_S = 1.0  # a node that did not answer in time is not tried again before
IDLE_S = 60.0  # a session that nobody used for longer ends


class Bulk:
    """A connection that carries payloads, one transfer at a time."""

    def __init__(self, connection: Connection) -> None:
        self.sock = connection.detach()
        sockets.enlarge(self.sock)
        self.scratch = memoryview(bytearray(MAX_HEADER_BYTES))
        self._connection = connection
        self._last_id = 0

    def next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def alive(self) -> bool:
        return not sockets.end_of(self.sock)()

    def interrupt(self) -> None:
        self._connection.interrupt()

    def close(self) -> None:
        self.sock.close()


Used = TypeVar("Used", Connection, Bulk)


class _Session:
    """One session with another node. Thread-safe."""

    def __init__(self, address: str, hello: node_pb2.HelloRequest, deadline_s: float) -> None:
        self.address = address
        self.used_s = time.monotonic()
        self.users = 0  # guarded by the Peers' lock
        self._hello = hello
        self._lock = threading.Lock()
        self._calls: list[Connection] = []
        self._bulks: list[Bulk] = []
        self._busy: set[Connection | Bulk] = set()
        self._closed = False
        self._owner = Connection(address, deadline_s)
        try:
            self.answer = self._owner.call("hello", hello, deadline_s).hello_response
        except BaseException:
            self._owner.close()
            raise

    def alive(self) -> bool:
        return self._owner.alive()

    @contextlib.contextmanager
    def connection(self, deadline_s: float) -> Iterator[Connection]:
        """Borrows a connection for calls."""
        connection = self._unused(self._calls) or self._join(deadline_s)
        self._begin(connection)
        try:
            yield connection
        finally:
            connection.late.clear()  # no node grants another one what would have to be undone
            with self._lock:
                self._busy.discard(connection)
                if connection.closed or self._closed:
                    connection.close()
                else:
                    self._calls.append(connection)

    @contextlib.contextmanager
    def bulk(self, deadline_s: float) -> Iterator[Bulk]:
        """Borrows a connection for transfers; after a failure it is not used again."""
        bulk = self._unused(self._bulks) or Bulk(self._join(deadline_s, "bulk"))
        self._begin(bulk)
        kept = False
        try:
            yield bulk
            kept = True
        finally:
            with self._lock:
                self._busy.discard(bulk)
                if kept and not self._closed:
                    self._bulks.append(bulk)
                else:
                    bulk.close()  # half a transfer may be under way; this ends it on both sides

    def close(self) -> None:
        """Ends the session, and what is under way in it."""
        with self._lock:
            self._closed = True
            self._owner.close()
            for connection in self._calls:
                connection.close()
            for bulk in self._bulks:
                bulk.close()
            for busy in self._busy:
                busy.interrupt()

    def _unused(self, kept: list[Used]) -> Used | None:
        """The last that was given back, if it is good."""
        with self._lock:
            found = kept.pop() if kept else None
        if found is None or found.alive():
            return found
        found.close()
        return None

    def _begin(self, used: Connection | Bulk) -> None:
        with self._lock:
            self._busy.add(used)
            if self._closed:
                used.interrupt()

    def _join(self, deadline_s: float, *features: str) -> Connection:
        connection = Connection(self.address, deadline_s)
        try:
            request = node_pb2.HelloRequest()
            request.CopyFrom(self._hello)
            request.session = self.answer.session
            request.features.extend(features)
            connection.call("hello", request, deadline_s)
        except BaseException as error:
            connection.close()
            if isinstance(error, Refused) and not self.alive():
                raise Unreachable(f"the session with {self.address} has ended") from error
            raise
        return connection


class _Place:
    """What is known of one other node."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while a session is opened
        self.session: _Session | None = None
        self.addresses: list[str] = []
        self.away_until_s = time.monotonic()

    def forgettable(self, now_s: float) -> bool:
        """Whether it is as good as unknown: nodes come and go under ever new names."""
        if self.session is not None and (self.session.users or self.session.alive()):
            return False
        return not self.lock.locked() and now_s >= self.away_until_s + IDLE_S


class Peers:
    """Every session of this node with others. `peer_token` is what nodes show each other."""

    def __init__(self, node: str, host: str) -> None:
        self.peer_token = b""
        self.met: Callable[[str, int], None] | None = None  # told of each session that begins
        self._node = node
        self._host = host
        self._lock = threading.Lock()
        self._places: dict[str, _Place] = {}
        self._pool = ThreadPoolExecutor(CALL_THREADS, "kvfabric-peer")
        self._gates: dict[str, asyncio.Semaphore] = {}
        self._waiting = 0
        self._closed = False

    async def call(
        self,
        node: str,
        endpoints: types_pb2.Endpoints,
        method: str,
        request: Message,
        timeout_s: float,
    ) -> Any:
        """One call to another node by its name in lower case; its response.

        Raises what the node answered, DeadlineExceeded, Unreachable, or Retry where too many
        calls wait.
        """
        if self._waiting >= MAX_WAITING_CALLS:
            raise Retry(f"{self._waiting} calls to other nodes wait; come again later")
        self._waiting += 1
        try:
            deadline_s = time.monotonic() + timeout_s
            gate = self._gates.setdefault(node, asyncio.Semaphore(CALLS_PER_NODE))
            try:
                async with asyncio.timeout(timeout_s):
                    await gate.acquire()
            except TimeoutError as error:
                raise DeadlineExceeded(f"node {node} does not answer other calls") from error
            try:
                if self._closed:
                    raise Unreachable("this node stops, and calls no other one any more")
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(
                    self._pool, self.call_now, node, endpoints, method, request, deadline_s
                )
            finally:
                gate.release()
        finally:
            self._waiting -= 1

    def call_now(
        self,
        node: str,
        endpoints: types_pb2.Endpoints,
        method: str,
        request: Message,
        deadline_s: float,
    ) -> Any:
        """As `call`, for threads that may wait."""
        with self._lock:
            place = self._places.setdefault(node, _Place())
        if time.monotonic() < place.away_until_s:
            raise Unreachable(f"node {node} did not answer a moment ago")
        with (
            self._session(node, endpoints, deadline_s) as session,
            session.connection(deadline_s) as connection,
        ):
            try:
                frame = connection.call(method, request, deadline_s)
            except DeadlineExceeded:
                place.away_until_s = time.monotonic() + AWAY_S
                raise
            return getattr(frame, f"{method}_response")

    @contextlib.contextmanager
    def bulk(self, node: str, endpoints: types_pb2.Endpoints, deadline_s: float) -> Iterator[Bulk]:
        """Borrows a connection for transfers, in a thread that may wait."""
        with (
            self._session(node, endpoints, deadline_s) as session,
            session.bulk(deadline_s) as bulk,
        ):
            yield bulk

    def sweep(self) -> None:
        """Ends sessions that nobody used for long, and the oldest where they are too many.
        On the loop, as `call`."""
        now_s = time.monotonic()
        with self._lock:
            sessions = [p.session for p in self._places.values() if p.session is not None]
            idle = sorted((s for s in sessions if not s.users), key=lambda s: s.used_s)
            surplus = len(sessions) - MAX_SESSIONS
            for node, place in list(self._places.items()):
                if place.forgettable(now_s):
                    del self._places[node]
                    self._gates.pop(node, None)  # calls go on through their old one
            forgotten = {s for s in sessions if not s.alive() and not s.users}
        for session in forgotten:
            session.close()
        for index, session in enumerate(idle):
            if session.used_s + IDLE_S < now_s or index < surplus:
                session.close()  # whoever takes it at this moment finds it ended, and tries again

    def close(self) -> None:
        """Ends every session and waits for the calls that are under way."""
        with self._lock:
            self._closed = True
            sessions = [place.session for place in self._places.values()]
        for session in sessions:
            if session is not None:
                session.close()
        self._pool.shutdown(cancel_futures=True)

    @contextlib.contextmanager
    def _session(
        self, node: str, endpoints: types_pb2.Endpoints, deadline_s: float
    ) -> Iterator[_Session]:
        session = self._open_session(node, endpoints, deadline_s)
        try:
            yield session
        finally:
            with self._lock:
                session.users -= 1
                session.used_s = time.monotonic()

    def _open_session(
        self, node: str, endpoints: types_pb2.Endpoints, deadline_s: float
    ) -> _Session:
        with self._lock:
            place = self._places.setdefault(node, _Place())
        addresses = self._addresses(endpoints)
        if not place.lock.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            raise DeadlineExceeded(f"node {node} was not reached in time")
        try:
            session = place.session
            if session is None or place.addresses != addresses or not session.alive():
                if session is not None:
                    session.close()
                place.session, place.addresses = None, addresses
                session = self._connect(node, place, deadline_s)
            with self._lock:
                if self._closed:
                    session.close()
                    raise Unreachable("this node is being stopped")
                place.session = session
                self._places[node] = place  # it may have been swept meanwhile
                session.users += 1
            return session
        finally:
            place.lock.release()

    def _connect(self, node: str, place: _Place, deadline_s: float) -> _Session:
        """A new session, over the first address that answers."""
        now_s = time.monotonic()
        if now_s < place.away_until_s:
            raise Unreachable(f"node {node} did not answer a moment ago")
        failure: FabricError = Unreachable(f"node {node} offers no address")
        for address in place.addresses:
            try:
                until_s = min(deadline_s, time.monotonic() + CONNECT_TIMEOUT_S)
                session = _Session(address, self._greeting(), until_s)
            except FabricError as error:
                failure = error
                if isinstance(error, DeadlineExceeded):
                    place.away_until_s = time.monotonic() + AWAY_S
                continue
            if session.answer.node == node:
                if self.met is not None:
                    self.met(node, session.answer.incarnation)
                return session
            session.close()
            failure = Unreachable(f"at {address} is node {session.answer.node} now, not {node}")
        raise failure

    def _addresses(self, endpoints: types_pb2.Endpoints) -> list[str]:
        """The same host's unix socket first: another container's cannot be reached so."""
        addresses = []
        if endpoints.unix_path and endpoints.host == self._host:
            addresses.append(f"unix:{endpoints.unix_path}")
        if endpoints.tcp_address:
            addresses.append(f"tcp:{endpoints.tcp_address}")
        return addresses

    def _greeting(self) -> node_pb2.HelloRequest:
        if not self.peer_token:
            raise Retry("this node has no peer_token yet: its manager gives it one")
        return node_pb2.HelloRequest(
            min_version=PROTOCOL_VERSION,
            max_version=PROTOCOL_VERSION,
            client=f"kvfabric-node/{self._node}",
            peer_token=self.peer_token,
        )
