"""Blocking sockets with deadlines; foreign errors are translated here.

Deadlines are moments of the monotonic clock. Every call here releases the GIL while
it waits or copies.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from kvfabric.errors import DeadlineExceeded, Refused, Retry, Unreachable
from kvfabric.rpc.v1 import wire_pb2
from kvfabric.wire import frames

# Large enough for a bulk frame to be under way while the next one is prepared.
BULK_BUFFER_BYTES = 4 << 20
# Of one receive that takes what there is. Python allocates all of it beforehand, and from
# 128 KiB on malloc maps and unmaps fresh pages every time, which costs 10 to 20 us.
RECEIVE_BYTES = 64 << 10

_TIMEVAL = struct.Struct("ll")

T = TypeVar("T")


def connect(address: str, deadline_s: float, *, bulk: bool = False) -> socket.socket:
    """Connects to "unix:PATH" or "tcp:HOST:PORT"."""
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest:
        sock = _open(socket.AF_UNIX)
        target: str | tuple[str, int] = rest
    elif kind == "tcp" and _is_port(rest.rpartition(":")[2]):
        host, _, port = rest.rpartition(":")
        sock = _open(socket.AF_INET6 if ":" in host else socket.AF_INET)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        target = (host.strip("[]"), int(port))
    else:
        raise Refused(f"address {address!r}: it must be unix:PATH or tcp:HOST:PORT")
    if bulk:
        enlarge(sock)
    try:
        # A unix listener whose backlog is full is waited for.
        _within(sock, deadline_s, socket.SO_SNDTIMEO, sock.connect, target)
    except BaseException:
        sock.close()
        raise
    return sock


def _open(family: int) -> socket.socket:
    try:
        return socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise Retry(
            f"cannot open a socket: {error}; raise the limit of open files (ulimit -n)"
        ) from error


def enlarge(sock: socket.socket) -> None:
    """Buffers for bulk frames; the kernel may grant less."""
    if sock.family == socket.AF_UNIX:  # TCP tunes itself, better than a fixed size would
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BULK_BUFFER_BYTES)


def send(sock: socket.socket, head: bytes, payload: memoryview | None, deadline_s: float) -> None:
    """A packed frame and the payload that belongs behind it."""
    if payload is None:
        send_all(sock, memoryview(head), deadline_s)
        return
    count = _within(sock, deadline_s, socket.SO_SNDTIMEO, sock.sendmsg, [head, payload])
    send_all(sock, memoryview(head)[count:], deadline_s)
    send_all(sock, payload[max(0, count - len(head)) :], deadline_s)


def send_all(sock: socket.socket, data: memoryview, deadline_s: float) -> None:
    while data:
        data = data[_within(sock, deadline_s, socket.SO_SNDTIMEO, sock.send, data) :]


def receive_into(sock: socket.socket, place: memoryview, deadline_s: float) -> None:
    """Fills `place`. Unreachable where the stream ends before."""
    while place:
        count = _within(
            sock, deadline_s, socket.SO_RCVTIMEO, sock.recv_into, place, 0, socket.MSG_WAITALL
        )
        if not count:
            raise Unreachable("the peer closed the connection")
        place = place[count:]


def receive_some(sock: socket.socket, deadline_s: float) -> bytes:
    """What there is, at least one byte. Unreachable where the stream has ended."""
    data = _within(sock, deadline_s, socket.SO_RCVTIMEO, sock.recv, RECEIVE_BYTES)
    if not data:
        raise Unreachable("the peer closed the connection")
    return data


def receive_frame(
    sock: socket.socket, scratch: memoryview, deadline_s: float
) -> tuple[wire_pb2.Frame, int]:
    """The next frame's header, and how many bytes of payload follow it."""
    prefix = scratch[: frames.PREFIX.size]
    receive_into(sock, prefix, deadline_s)
    header_bytes, payload_bytes = frames.lengths(prefix)
    header = scratch[:header_bytes]
    receive_into(sock, header, deadline_s)
    return frames.parse(header), payload_bytes


def receive_with_descriptors(
    sock: socket.socket, most: int, deadline_s: float
) -> tuple[bytes, list[int]]:
    """What there is and the descriptors beside it, which become the caller's."""
    data, descriptors, _, _ = _within(
        sock, deadline_s, socket.SO_RCVTIMEO, socket.recv_fds, sock, RECEIVE_BYTES, most
    )
    if not data:
        raise Unreachable("the peer closed the connection")
    return data, descriptors


def end_of(sock: socket.socket) -> Callable[[], bool]:
    """Tells, whenever asked, whether the peer has closed: true at once after its process died."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)  # seen even behind unread bytes
    lock = threading.Lock()  # Python refuses to poll one object from two threads at once

    def ended() -> bool:
        with lock:
            return bool(poll.poll(0))

    return ended


def _within(
    sock: socket.socket, deadline_s: float, option: int, call: Callable[..., T], *arguments: Any
) -> T:
    """One call of a blocking socket, with what is left until the deadline as its `option`.

    The kernel keeps the time: a Python timeout would poll before every call, and would be
    woken for every piece of a payload that MSG_WAITALL takes at once.
    """
    left_us = int((deadline_s - time.monotonic()) * 1e6)
    try:
        if left_us <= 0:
            raise TimeoutError
        sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(left_us, 10**6)))
        return call(*arguments)
    except (BlockingIOError, TimeoutError) as error:
        raise DeadlineExceeded("the peer did not answer in time") from error
    except OSError as error:
        raise Unreachable(f"the connection failed: {error}") from error


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < 1 << 16
