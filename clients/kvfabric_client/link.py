"""A session with one node: its connections, the segments it maps, its open namespaces.

A link lives as long as its first connection, which carries no calls, so that no failed
call can cost it. The node takes nothing back before that connection closes, and it closes
at once when the node dies: `alive()` after a copy out of shared memory proves that the
bytes were not used for anything else meanwhile.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator

from google.protobuf.message import Message

from kvfabric import __version__
from kvfabric.errors import DeadlineExceeded, FabricError, Refused, Retry, Unreachable
from kvfabric.memory import populate
from kvfabric.rpc.v1 import node_pb2, types_pb2, wire_pb2
from kvfabric.types import PROTOCOL_VERSION, Namespace, NamespaceId
from kvfabric.wire import sockets
from kvfabric.wire.connection import MAX_DESCRIPTORS, Connection
from kvfabric.wire.frames import MAX_HEADER_BYTES
from kvfabric_client.ended import Mapping, ended_sessions
from kvfabric_client.prepared import PreparedConnection

MAX_CALL_CONNECTIONS = 4
MAX_BULK_CONNECTIONS = 4
MAX_IDLE_LANES = 4
RELEASE_S = 0.005  # how late a lease that was given back may reach an otherwise idle node
RELEASE_LOOKS = 100
RELEASE_TIMEOUT_S = 1.0

POPULATE_STEP_BYTES = 4 << 20
POPULATE_S = 0.05  # per segment; where the node is still faulting its memory in, it takes longer


class Link:
    """Thread-safe: every call borrows a connection that nobody else uses meanwhile."""

    def __init__(
        self,
        address: str,
        principal: str,
        token: bytes,
        deadline_s: float,
        *,
        checked: bool = True,
        bulk_only: bool = False,
    ) -> None:
        self.address = address
        self._principal = principal
        self._token = token
        self._checked = checked
        self._lock = threading.Lock()
        self._returned = threading.Condition(self._lock)
        self._opened: set[NamespaceId] = set()
        self._segments: dict[int, memoryview] = {}
        self._mappings: list[Mapping] = []  # of these, and of those that were given back
        self._released: deque[int] = deque()
        self._release_soon = threading.Event()
        self._releaser: threading.Thread | None = None
        self._owner = Connection(address, deadline_s, self._released)
        try:
            self.hello = self._greet(self._owner, ["shm", "attend"], b"", deadline_s)
        except BaseException:
            self._owner.close()
            raise
        self._calls: list[Connection] = []
        self._call_count = 0
        self._lanes: list[Connection] = []
        self._attending: list[PreparedConnection] = []
        self._bulks: list[BulkConnection] = []
        self._bulk_count = 0
        self.shares_memory = "shm" in self.hello.features and not bulk_only

    @property
    def node(self) -> str:
        return self.hello.node

    def alive(self) -> bool:
        return self._owner.alive()

    def close(self) -> None:
        """Ends the session; views that are still open keep their mapping, not their lease."""
        with self._lock:
            if self._mappings:
                ended_sessions.add(self.address, self.hello.session, self._mappings)
                self._mappings = []
                self._segments.clear()
            self._owner.close()
            for connection in [*self._calls, *self._lanes]:
                connection.close()
            for bulk in self._bulks:
                bulk.close()
            for prepared in self._attending:
                prepared.close()
            self._returned.notify_all()
        self._release_soon.set()
        if self._releaser is not None and self._releaser is not threading.current_thread():
            self._releaser.join()

    # Calls --------------------------------------------------------------------------

    def call(self, name: str, request: Message, deadline_s: float) -> wire_pb2.Frame:
        """One call to the node."""
        with self.connection(deadline_s) as connection:
            return connection.call(name, request, deadline_s)

    @contextlib.contextmanager
    def connection(self, deadline_s: float) -> Iterator[Connection]:
        """Borrows a connection for calls."""
        connection = self._borrow(deadline_s)
        try:
            yield connection
        finally:
            self._undo_late(connection)
            self._give_back_retired(connection)
            with self._lock:
                if connection.closed or self._owner.closed:
                    connection.close()
                    self._call_count -= 1
                else:
                    self._calls.append(connection)
                self._returned.notify_all()

    def take_lane(self, deadline_s: float) -> Connection:
        """A connection for calls whose answers are awaited while others are made, until
        `give_lane`. There is always one more: whoever holds one waits for nobody who does."""
        with self._lock:
            while self._lanes:
                connection = self._lanes.pop()
                if connection.alive():
                    return connection
                connection.close()
        return self._join(deadline_s)

    def give_lane(self, connection: Connection) -> None:
        self._undo_late(connection)
        self._give_back_retired(connection)
        with self._lock:
            spare = len(self._lanes) < MAX_IDLE_LANES and not self._owner.closed
            if connection.closed or not spare:
                connection.close()
            else:
                self._lanes.append(connection)

    def take_prepared(self, deadline_s: float) -> PreparedConnection | None:
        """A connection for prepared queries, until `give_prepared`; None: the node has none."""
        if "attend" not in self.hello.features:
            return None
        with self._lock:
            if self._attending:
                return self._attending.pop()
        return PreparedConnection(self._join(deadline_s, "attend"))

    def give_prepared(self, connection: PreparedConnection) -> None:
        with self._lock:
            spare = len(self._attending) < MAX_IDLE_LANES and not self._owner.closed
            if spare and connection.usable:
                self._attending.append(connection)
            else:
                connection.close()

    def _undo_late(self, connection: Connection) -> None:
        """Gives back what was granted after its caller had given up: nobody knows of it."""
        late, connection.late = connection.late, []
        for frame in late:
            if frame.acquire_response.lease:
                self.release(frame.acquire_response.lease)
            if frame.reserve_response.reservation and not connection.closed:
                abort = node_pb2.AbortRequest(reservation=frame.reserve_response.reservation)
                with contextlib.suppress(FabricError):
                    connection.tell("abort", abort, time.monotonic() + RELEASE_TIMEOUT_S)
            for opened in (frame.open_sequence_response, frame.fork_response):
                # One that was resumed, in a later epoch, may be resumed again.
                if opened.sequence and opened.epoch == 1 and not connection.closed:
                    close = node_pb2.CloseSequenceRequest(sequence=opened.sequence, epoch=1)
                    with contextlib.suppress(FabricError):
                        connection.tell(
                            "close_sequence", close, time.monotonic() + RELEASE_TIMEOUT_S
                        )

    def _borrow(self, deadline_s: float) -> Connection:
        with self._lock:
            while True:
                if self._owner.closed:
                    raise Unreachable(f"the session with {self.address} has ended")
                if self._calls:
                    connection = self._calls.pop()
                    if connection.alive():
                        return connection
                    connection.close()
                    self._call_count -= 1
                elif self._call_count < MAX_CALL_CONNECTIONS:
                    self._call_count += 1
                    break
                else:
                    self._wait_for_connection(deadline_s)
        try:
            return self._join(deadline_s)
        except BaseException:
            with self._lock:
                self._call_count -= 1
                self._returned.notify_all()
            raise

    def _wait_for_connection(self, deadline_s: float) -> None:
        """Waits for one that another thread has borrowed."""
        if not self._returned.wait(max(0.0, deadline_s - time.monotonic())):
            raise DeadlineExceeded(
                f"every connection to {self.address} was in use until the deadline of this call"
            )

    def _join(self, deadline_s: float, *features: str) -> Connection:
        connection = Connection(self.address, deadline_s, self._released)
        try:
            self._greet(connection, list(features), self.hello.session, deadline_s)
        except BaseException as error:
            connection.close()
            if isinstance(error, Refused) and not self.alive():
                raise Unreachable(f"the session with {self.address} has ended") from error
            raise
        return connection

    def _greet(
        self, connection: Connection, features: list[str], session: bytes, deadline_s: float
    ) -> node_pb2.HelloResponse:
        request = self._hello_request(session)
        request.features.extend(features or ["shm"])
        return connection.call("hello", request, deadline_s).hello_response

    def _hello_request(self, session: bytes = b"") -> node_pb2.HelloRequest:
        return node_pb2.HelloRequest(
            min_version=PROTOCOL_VERSION,
            max_version=PROTOCOL_VERSION,
            client=f"kvfabric-python/{__version__} pid {os.getpid()}",
            principal=self._principal,
            token=self._token,
            features=[] if self._checked else ["unchecked"],
            session=session,
        )

    def open(self, namespace: Namespace, expected: NamespaceId, deadline_s: float) -> None:
        """Opens the namespace with the id `expected` in this session; safe to repeat."""
        if expected in self._opened:
            return
        request = self._hello_request()
        request.namespaces.append(
            types_pb2.Namespace(
                tenant=namespace.tenant, fingerprint=namespace.fingerprint, salt=namespace.salt
            )
        )
        request.session = self.hello.session
        answer = self.call("hello", request, deadline_s).hello_response
        if list(answer.namespace_ids) != [expected]:
            raise Refused(
                f"node {self.node} names this namespace differently; client and node "
                "do not follow the same specification: bring the older one up to date"
            )
        self._opened.add(expected)

    def confess(self, deadline_s: float) -> None:
        """Tells the node which sessions of its earlier starts have let go of its memory."""
        ended = ended_sessions.take(self.address)
        if not ended:
            return
        request = self._hello_request(self.hello.session)
        request.ended_sessions.extend(ended)
        try:
            self.call("hello", request, deadline_s)
        except FabricError:  # the next call tries again
            for session in ended:
                ended_sessions.add(self.address, session, ())

    # Leases ---------------------------------------------------------------------------

    def release(self, lease: int) -> None:
        """Gives a lease back: with the next request, or a few milliseconds from now."""
        self._released.append(lease)
        if self._release_soon.is_set():
            return
        self._release_soon.set()
        if self._releaser is None:
            self._releaser = threading.Thread(
                target=self._release_late, name="kvfabric-release", daemon=True
            )
            self._releaser.start()

    def _release_late(self) -> None:
        """Sends what no request took along. It looks again and again while leases come and
        go, for waking it for each of them would cost as much as sending a message."""
        quiet = 0
        while self.alive():  # else the node has taken back all leases, with the session
            if quiet >= RELEASE_LOOKS:
                self._release_soon.clear()
                if not self._released:
                    self._release_soon.wait()
                quiet = 0
            time.sleep(RELEASE_S)
            quiet += 1
            if self._released:
                quiet = 0
                deadline_s = time.monotonic() + RELEASE_TIMEOUT_S
                with contextlib.suppress(FabricError), self.connection(deadline_s) as connection:
                    connection.tell("release", node_pb2.ReleaseRequest(), deadline_s)

    # Shared memory --------------------------------------------------------------------

    def place(self, segment: int, offset: int, size_bytes: int) -> memoryview:
        """Bytes of a segment that `map_segments` has mapped."""
        mapped = self._segments.get(segment)
        if mapped is None:
            raise Unreachable(f"the session with {self.address} has ended")
        return mapped[offset : offset + size_bytes]

    def map_segments(self, segments: set[int], deadline_s: float) -> None:
        """Maps what is not mapped yet."""
        missing = sorted(segments - self._segments.keys())
        for start in range(0, len(missing), MAX_DESCRIPTORS):
            wanted = missing[start : start + MAX_DESCRIPTORS]
            request = wire_pb2.MapRequest(segments=wanted)
            with self.connection(deadline_s) as connection:
                frame, descriptors = connection.call_for_descriptors("map", request, deadline_s)
            answer = frame.map_response
            if len(descriptors) != len(answer.segments):
                for descriptor in descriptors:
                    os.close(descriptor)
                raise Refused(
                    f"node {self.node} sent {len(descriptors)} of {len(wanted)} descriptors; "
                    "is the limit of open files reached? See `ulimit -n`"
                )
            try:
                for segment, size_bytes, descriptor in zip(
                    answer.segments, answer.size_bytes, descriptors, strict=True
                ):
                    mapped = mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_SHARED)
                    _enter_pages(mapped)
                    self._keep(segment, mapped)
            except OSError as error:
                raise Retry(
                    f"cannot map the memory of node {self.node}: {error}; raise the limits of "
                    "open files (ulimit -n) and of address space (ulimit -v)"
                ) from error
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _keep(self, segment: int, mapped: mmap.mmap) -> None:
        with self._lock:
            if self._owner.closed:  # what is mapped from here on, nobody would know of
                raise Unreachable(f"the session with {self.address} has ended")
            self._mappings = [each for each in self._mappings if each() is not None]
            self._mappings.append(weakref.ref(mapped))
            self._segments[segment] = memoryview(mapped)

    def _give_back_retired(self, connection: Connection) -> None:
        """Lets go of segments that the node wants back; it asks again until it is told so."""
        retired, connection.retired = connection.retired, set()
        for segment in retired:
            self._segments.pop(segment, None)
        if retired and not connection.closed:
            until_s = time.monotonic() + RELEASE_TIMEOUT_S
            with contextlib.suppress(FabricError):
                connection.tell("unmap", wire_pb2.UnmapRequest(segments=sorted(retired)), until_s)

    # Bulk -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def bulk(self, deadline_s: float) -> Iterator[BulkConnection]:
        """Borrows a connection for one transfer; after a failure it is not used again."""
        with self._lock:
            while not self._bulks and self._bulk_count >= MAX_BULK_CONNECTIONS:
                self._wait_for_connection(deadline_s)
            bulk = self._bulks.pop() if self._bulks else None
            self._bulk_count += bulk is None
        try:
            if bulk is None:
                bulk = BulkConnection(self._join(deadline_s, "bulk"))
            yield bulk
        except BaseException:
            # Half a transfer may be under way; closing ends it on both sides.
            if bulk is not None:
                bulk.close()
            with self._lock:
                self._bulk_count -= 1
                self._returned.notify_all()
            raise
        with self._lock:
            if self._owner.closed:
                bulk.close()
                self._bulk_count -= 1
            else:
                self._bulks.append(bulk)
            self._returned.notify_all()


def _enter_pages(mapped: mmap.mmap) -> None:
    """Spares the first copies their page faults."""
    until_s = time.monotonic() + POPULATE_S
    with contextlib.suppress(OSError):  # an old kernel: the copies fault, a little slower
        for start in range(0, len(mapped), POPULATE_STEP_BYTES):
            if time.monotonic() > until_s:
                return
            populate(mapped, start, min(POPULATE_STEP_BYTES, len(mapped) - start), write=False)


class BulkConnection:
    """A connection that carries payloads, one transfer at a time."""

    def __init__(self, connection: Connection) -> None:
        self.sock = connection.detach()
        sockets.enlarge(self.sock)
        self.scratch = memoryview(bytearray(MAX_HEADER_BYTES))
        self.last_id = 0

    def close(self) -> None:
        self.sock.close()
