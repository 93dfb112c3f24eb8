"""The wire's serving end: unix and TCP sockets, calls on the core's loop, bulk in threads.

A session belongs to the connection that opened it; further connections join it. When
its first connection ends, the others are shut down, and only when the last of them is
gone (so that no thread still fills an extent) does the core take back what it held.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

import structlog

from kvfabric.errors import Broken, Denied, FabricError, Refused, Retry, to_proto
from kvfabric.rpc.v1 import wire_pb2
from kvfabric.wire import frames, sockets
from kvfabric_nodes.serving.bulk import serve_bulk
from kvfabric_nodes.serving.handler import Handler, Taker
from kvfabric_nodes.store.promises import Session

log = structlog.get_logger(__name__)

T = TypeVar("T")

MAX_CONNECTIONS = 1024
MAX_THREADS = 64  # of connections that are taken over, for each feature
HELLO_TIMEOUT_S = 10.0
FRAME_TIMEOUT_S = 30.0  # for the rest of a frame that has begun
MAX_UNSENT_BYTES = 8 << 20  # answers that a client does not fetch
MAX_WAITING_CALLS = 256  # per connection
ACCEPT_PAUSE_S = 0.5  # after a failed accept
MAX_MAP_SEGMENTS = 64

KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))

_UCRED = struct.Struct("3i")


class Peer:
    """A session and the connections that carry it."""

    def __init__(self, session: Session, owner: CallConnection) -> None:
        self.session = session
        self.owner = owner
        self.token = secrets.token_bytes(16)
        self.connections: set[CallConnection | socket.socket] = {owner}


class CallConnection:
    """One connection on the loop: request frames in, answers out."""

    def __init__(self, server: WireServer, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.is_unix = sock.family == socket.AF_UNIX
        self.peer: Peer | None = None
        self._inbox = frames.Inbox()
        self._unsent: bytearray = bytearray()
        self._waiting: set[asyncio.Task[None]] = set()
        self._deaf = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(
            HELLO_TIMEOUT_S, self._give_up, "said no hello in time"
        )
        self._loop.add_reader(sock, self._on_readable)

    def _on_readable(self) -> None:
        try:
            data = self.sock.recv(sockets.RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        if self._deaf:
            return
        try:
            for frame in self._inbox.feed(data):
                self._on_frame(frame)
                if not self._listening():
                    return
                if self.peer and self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
        except FabricError as error:
            self._refuse(error)
            return
        if self._inbox and self._timer is None:
            self._timer = self._loop.call_later(
                FRAME_TIMEOUT_S, self._give_up, "did not finish a frame in time"
            )

    def _listening(self) -> bool:
        """False once it is closed or deaf, or a bulk thread has taken the socket over."""
        return self in self.server.connections and not self._deaf

    def _on_frame(self, frame: wire_pb2.Frame) -> None:
        body = frame.WhichOneof("body") or ""
        name = body.removesuffix("_request")
        answer = wire_pb2.Frame(id=frame.id)
        try:
            if name == body:
                raise Refused(f"a frame with {body or 'no body'} is not a request")
            if name == "hello":
                self._on_hello(frame, answer)
                return
            if self.peer is None:
                raise Refused("the first frame of a connection must be a hello_request")
            if frame.released_leases:
                self.server.handler.end_leases(self.peer.session, frame.released_leases)
            request = getattr(frame, body)
            if name in ("map", "unmap"):
                self._on_map(name, request, answer)
                return
            response = getattr(answer, f"{name}_response", None)
            if response is not None:
                response.SetInParent()
            later = self.server.handler.call(name, self.peer.session, request, response)
        except Exception as error:
            _put_error(answer, error)
            later = None
        if later is None:
            self._answer(answer)
            return
        if len(self._waiting) >= MAX_WAITING_CALLS:
            later.close()
            full = Retry(f"{MAX_WAITING_CALLS} calls wait on this connection; slow down")
            self._answer(wire_pb2.Frame(id=frame.id, error=to_proto(full)))
            return
        task = self._loop.create_task(self._finish(later, answer))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)
        task.add_done_callback(lambda _: later.close())  # cancelled before it began

    async def _finish(self, later: Any, answer: wire_pb2.Frame) -> None:
        try:
            await later
        except Exception as error:
            _put_error(answer, error)
        self._answer(answer)

    def _on_hello(self, frame: wire_pb2.Frame, answer: wire_pb2.Frame) -> None:
        request = frame.hello_request
        self.server.admit(self.sock)
        handler = self.server.handler
        takers = self.server.takers
        offered = frozenset({"unchecked", *takers, *(["shm"] if self.is_unix else [])})
        if request.session:
            peer = self.server.join(request.session)
            if self.peer not in (None, peer):
                raise Refused("this connection carries another session; open a new one to join")
            taken = sorted(takers.keys() & set(request.features))
            if taken and (self.peer or self._unsent):
                raise Refused(
                    f"this connection carries calls already; open a new one for {taken[0]}"
                )
            handler.hello(peer.session, request, answer.hello_response, offered)
            answer.hello_response.session = request.session
            if taken:
                self.server.to_thread(self, peer, answer, taken[0])
                return
            peer.connections.add(self)
            self.peer = peer
        else:
            session = handler.hello(
                self.peer.session if self.peer else None, request, answer.hello_response, offered
            )
            if self.peer is None:
                self.peer = self.server.open(session, self)
            answer.hello_response.session = self.peer.token
        self._answer(answer)

    def _on_map(self, name: str, request: Any, answer: wire_pb2.Frame) -> None:
        assert self.peer is not None
        core, arena = self.server.handler.core, self.server.handler.arena
        session, guests = self.peer.session, self.server.handler.guests
        if name == "unmap":
            if guests is not None:
                guests.unmapped(self.peer.token, request.segments)
            core.unmapped(session, request.segments)
            self.server.handler.renew_memory()
            answer.unmap_response.SetInParent()
            self._answer(answer)
            return
        if not self.is_unix:
            raise Refused("descriptors travel over unix sockets only; read over the wire instead")
        if not session.shares_memory:
            raise Refused("this session was opened over TCP and maps nothing; open one over unix")
        if len(request.segments) > MAX_MAP_SEGMENTS:
            raise Refused(f"at most {MAX_MAP_SEGMENTS} segments per map_request")
        for segment in request.segments:
            found = core.extents.segments.get(segment)
            if found is None or found.tenant != session.tenant:
                raise Denied(f"segment {segment} is not one of tenant {session.tenant!r}")
        if self._unsent:
            raise Retry("answers are waiting to be fetched; fetch them before mapping")
        answer.map_response.segments.extend(request.segments)
        answer.map_response.size_bytes.extend([arena.segment_bytes] * len(request.segments))
        descriptors = [arena.descriptor(segment) for segment in request.segments]
        data = frames.pack(answer)
        if guests is not None:
            guests.mapped(self.peer.token, _credentials(self.sock)[0], request.segments)
        try:
            sent = socket.send_fds(self.sock, [data], descriptors)
        except BlockingIOError as error:
            raise Retry("answers are waiting to be fetched; fetch them before mapping") from error
        except OSError:
            self.close()
            return
        session.mapped.update(request.segments)
        self._queue(data[sent:])

    def _answer(self, answer: wire_pb2.Frame) -> None:
        if not answer.id or self.sock.fileno() < 0:
            return
        retired = self.server.handler.core.extents.retired
        if retired and self.peer:
            answer.retired_segments.extend(retired.keys() & self.peer.session.mapped)
        try:
            data = frames.pack(answer)
        except Refused as error:
            data = frames.pack(wire_pb2.Frame(id=answer.id, error=to_proto(error)))
        if not self._unsent:
            try:
                data = data[self.sock.send(data) :]
            except BlockingIOError:
                pass
            except OSError:
                self.close()
                return
        self._queue(data)

    def _queue(self, data: bytes) -> None:
        if not data:
            return
        if not self._unsent:
            self._loop.add_writer(self.sock, self._on_writable)
        self._unsent += data
        if len(self._unsent) > MAX_UNSENT_BYTES:
            self._give_up("does not fetch its answers")

    def _on_writable(self) -> None:
        try:
            del self._unsent[: self.sock.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not self._unsent:
            self._loop.remove_writer(self.sock)

    def _refuse(self, error: FabricError) -> None:
        """Tells the peer why, then stops listening to it."""
        kind = "unix" if self.is_unix else "tcp"
        self.server.handler.metrics.protocol_errors[kind] += 1
        log.warning("protocol_error", why=str(error), unix=self.is_unix)
        with contextlib.suppress(OSError):
            self.sock.send(frames.pack(wire_pb2.Frame(error=to_proto(error))))
        self._stop_listening()

    def _give_up(self, why: str) -> None:
        self._timer = None
        log.warning("connection_ended", why=f"the client {why}")
        self._stop_listening()

    def _stop_listening(self) -> None:
        """Ends the connection, but not over the head of a client that maps our memory.

        It may still touch its extents, so they stay quarantined until it closes its end;
        until then the connection is deaf.
        """
        if self.is_unix and self.peer and self.peer.session.mapped:
            self._deaf = True
        else:
            self.close()

    def detach(self) -> None:
        """Gives the socket away."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self.sock)
        self.server.connections.discard(self)

    def close(self) -> None:
        if self.sock.fileno() < 0:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self.sock)
        self._loop.remove_writer(self.sock)
        self.sock.close()
        for task in list(self._waiting):
            task.cancel()
        self.server.closed(self)


class WireServer:
    """Listens on unix and TCP sockets. All methods run on the loop unless they say otherwise."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.connections: set[CallConnection] = set()
        self._peers: dict[bytes, Peer] = {}
        self._listeners: list[socket.socket] = []
        self._threads: dict[threading.Thread, str] = {}  # by the feature that they serve
        self._threads_ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.takers: dict[str, Taker] = {"bulk": serve_bulk, **handler.takers}

    def listen(self, sock: socket.socket) -> None:
        """Serves connections of a bound socket."""
        sock.listen(128)
        sock.setblocking(False)
        self._listeners.append(sock)
        self._loop.add_reader(sock, self._accept, sock)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors, most likely: the client waits in the backlog meanwhile.
            remedy = "raise the limit of open files (ulimit -n)"
            log.error("accept_failed", why=str(error), remedy=remedy, again_in_s=ACCEPT_PAUSE_S)
            self._loop.remove_reader(listener)
            self._loop.call_later(ACCEPT_PAUSE_S, self._listen_again, listener)
            return
        if len(self.connections) + len(self._threads) >= MAX_CONNECTIONS:
            log.warning("connection_refused", limit=MAX_CONNECTIONS)
            sock.close()
            return
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(sock)
        self.connections.add(CallConnection(self, sock))

    def _listen_again(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self._loop.add_reader(listener, self._accept, listener)

    def admit(self, sock: socket.socket) -> None:
        """Refuses unix clients of another user."""
        if sock.family != socket.AF_UNIX:
            return
        _, uid, _ = _credentials(sock)
        if uid not in (0, os.getuid()):
            raise Denied(f"user {uid} may not use the node of user {os.getuid()}")

    def open(self, session: Session, owner: CallConnection) -> Peer:
        peer = Peer(session, owner)
        self._peers[peer.token] = peer
        return peer

    def join(self, token: bytes) -> Peer:
        peer = self._peers.get(token)
        if peer is None:
            raise Refused("no such session; it ended with its first connection. Connect anew")
        return peer

    def to_thread(
        self, connection: CallConnection, peer: Peer, answer: wire_pb2.Frame, feature: str
    ) -> None:
        """Hands a connection to a thread of its own, which also sends the answer."""
        if list(self._threads.values()).count(feature) >= MAX_THREADS:
            raise Retry(f"{MAX_THREADS} {feature} connections are open; close some")
        taker, sock = self.takers[feature], connection.sock
        kind = "unix" if connection.is_unix else "tcp"

        def serve() -> None:
            try:
                taker(sock, answer, peer.session, self, kind)
            finally:
                with contextlib.suppress(RuntimeError):  # the loop has ended: nothing to tell
                    self._loop.call_soon_threadsafe(ended)

        def ended() -> None:
            del self._threads[thread]
            if not self._threads:
                self._threads_ended.set()
            sock.close()
            self._left(peer, sock)

        thread = threading.Thread(target=serve, name="kvfabric-connection", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise Retry(f"{error}; close {feature} connections, or raise `ulimit -u`") from error
        self._threads[thread] = feature
        self._threads_ended.clear()
        connection.detach()
        peer.connections.add(sock)

    def on_core(self, call: Callable[[], T]) -> T:
        """Runs `call` on the loop, and answers or raises what it does. For bulk threads."""
        errand = _Errand(lambda: self._on_time(call))
        self._loop.call_soon_threadsafe(errand.run)
        return errand.result()

    def await_on_core(self, call: Coroutine[Any, Any, T]) -> T:
        """The same for what takes a while; the loop goes on meanwhile."""
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def tell_core(self, call: Callable[[], object]) -> None:
        """Runs `call` on the loop, after all that was asked of it before; nobody waits."""
        self._loop.call_soon_threadsafe(self._on_time, call)

    def _on_time(self, call: Callable[[], T]) -> T:
        self.handler.core.tick(self.handler.clock.now())
        return call()

    def closed(self, connection: CallConnection) -> None:
        self.connections.discard(connection)
        if connection.peer is not None:
            self._left(connection.peer, connection)

    def _left(self, peer: Peer, connection: CallConnection | socket.socket) -> None:
        peer.connections.discard(connection)
        if connection is peer.owner:
            self._peers.pop(peer.token, None)
            for other in list(peer.connections):
                if isinstance(other, CallConnection):
                    other.close()
                else:
                    with contextlib.suppress(OSError):
                        other.shutdown(socket.SHUT_RDWR)
        if not peer.connections:
            if self.handler.guests is not None:
                self.handler.guests.ended(peer.token)
            self.handler.close_session(peer.session)

    async def close(self) -> None:
        """Ends every connection and waits for the bulk threads, which end with theirs."""
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()
        for connection in list(self.connections):
            connection.close()
        if self._threads:
            await self._threads_ended.wait()


class _Errand(Generic[T]):
    """A call that one thread runs for another. A bare lock hands it over in half the time
    that a future takes."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._done = threading.Lock()
        self._done.acquire()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error
        finally:
            self._done.release()

    def result(self) -> T:
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._value


def _put_error(answer: wire_pb2.Frame, error: Exception) -> None:
    """The error as the answer. One that is not ours is a bug: the log has the whole of it."""
    if not isinstance(error, FabricError):
        log.exception("call_failed")
        error = Broken(f"the node failed: {error!r}; see its log")
    answer.ClearField("body")
    answer.error.CopyFrom(to_proto(error))


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end of a unix socket."""
    pid, uid, gid = _UCRED.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    )
    return pid, uid, gid


def _keep_alive(sock: socket.socket) -> None:
    """Notices a client whose host is gone, so that its session ends."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
