"""The keeper: a small process that holds a node's segments while its rManager is away.

It has duplicates of the segments' descriptors and a table of records, takes changes to both
from one rManager at a time, and hands all of it to the next one. It looks into neither. It
imports the standard library only and is run as a file, by an isolated interpreter.
"""

from __future__ import annotations

import array
import contextlib
import enum
import errno
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator

VERSION = 1  # of what is said between an rManager and a keeper
READY = b"ready\n"
HEADER = struct.Struct(">BI")  # operation, bytes of its body
SEGMENT = struct.Struct(">I")
KEY_BYTES = struct.Struct(">H")
MAX_BODY_BYTES = 16 << 20
RECEIVE_BYTES = 256 << 10
BATCH_BYTES = 64 << 10
MAX_DESCRIPTORS = 64  # per message
ACCEPT_PAUSE_S = 0.1  # after a connection that could not be accepted
HELLO_S = 2.0  # for an rManager that has connected to say so
HANDOVER_S = 30.0  # for it to take in the next piece of what is kept
_UCRED = struct.Struct("3i")


class Op(enum.IntEnum):
    HELLO = 1  # of both, the keeper first; body: the version
    PUT = 2  # body: length of the key, key, record
    DELETE = 3  # body: the key
    SEGMENT = 4  # body: its number; the descriptor travels beside it
    CLOSE = 5  # body: the number of a segment that is no more
    END = 6  # forget everything, and end
    REFUSED = 7  # to the rManager; body: why
    DONE = 8  # to the rManager: this was everything


def packed(op: Op, body: bytes = b"") -> bytes:
    return HEADER.pack(op, len(body)) + body


def put(key: bytes, record: bytes) -> bytes:
    return packed(Op.PUT, KEY_BYTES.pack(len(key)) + key + record)


def unpack_put(body: bytes) -> tuple[bytes, bytes]:
    (size,) = KEY_BYTES.unpack_from(body)
    start = KEY_BYTES.size
    return body[start : start + size], body[start + size :]


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(raw)
    return pid, uid


class Inbox:
    """Operations out of a stream whose pieces end anywhere, and the descriptors beside it."""

    def __init__(self) -> None:
        self.descriptors: deque[int] = deque()
        self._data = bytearray()

    def receive(self, sock: socket.socket) -> bool:
        """Takes in what has arrived; False at the end of the stream."""
        data, descriptors, flags, _ = socket.recv_fds(sock, RECEIVE_BYTES, MAX_DESCRIPTORS)
        self.descriptors.extend(descriptors)
        if flags & socket.MSG_CTRUNC:
            raise ValueError("descriptors were lost: raise the limit of open files (ulimit -n)")
        self._data += data
        return bool(data)

    def operations(self) -> Iterator[tuple[Op, bytes]]:
        """Those that have arrived whole. ValueError for what is none."""
        start = 0
        try:
            while len(self._data) - start >= HEADER.size:
                op, size = HEADER.unpack_from(self._data, start)
                if size > MAX_BODY_BYTES:
                    raise ValueError(f"an operation of {size} bytes; the limit is {MAX_BODY_BYTES}")
                end = start + HEADER.size + size
                if end > len(self._data):
                    break
                body = bytes(self._data[start + HEADER.size : end])
                start = end
                yield Op(op), body
        finally:
            del self._data[:start]

    def close(self) -> None:
        """Closes the descriptors that nobody took."""
        while self.descriptors:
            os.close(self.descriptors.popleft())


class _Ended(BaseException):
    """Why the keeper ends."""


class Keeper:
    """See the module."""

    def __init__(self, listener: socket.socket, keep_s: float) -> None:
        self.segments: dict[int, int] = {}
        self.table: dict[bytes, bytes] = {}
        self._listener = listener
        self._keep_s = keep_s
        self._owner: socket.socket | None = None
        self._inbox = Inbox()
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)

    def serve(self) -> None:
        """Until it has a reason to end, which it raises."""
        idle_until_s = time.monotonic() + self._keep_s
        while True:
            if self._owner is not None:
                idle_until_s = time.monotonic() + self._keep_s
            left_s = idle_until_s - time.monotonic()
            if left_s <= 0:
                raise _Ended(f"no rManager came within {self._keep_s:g} s")
            ready = self._poll.poll(None if self._owner else left_s * 1000 + 1)
            for descriptor, _ in ready:
                if descriptor == self._listener.fileno():
                    self._admit()
                elif self._owner is not None and descriptor == self._owner.fileno():
                    self._read()

    def _read(self) -> None:
        """Carries out what the rManager has sent, to the end of what has arrived."""
        assert self._owner is not None
        try:
            while self._inbox.receive(self._owner):
                for op, body in self._inbox.operations():
                    self._do(op, body)
        except BlockingIOError:
            return
        except OSError:
            pass
        except (ValueError, struct.error, IndexError) as error:
            raise _Ended(f"what came from the rManager is not understood: {error}") from error
        self._poll.unregister(self._owner)
        self._owner.close()
        self._owner = None
        self._inbox.close()

    def _do(self, op: Op, body: bytes) -> None:
        if op is Op.PUT:
            key, record = unpack_put(body)
            self.table[key] = record
        elif op is Op.DELETE:
            self.table.pop(body, None)
        elif op is Op.SEGMENT:
            self._close(*SEGMENT.unpack(body))
            self.segments[SEGMENT.unpack(body)[0]] = self._inbox.descriptors.popleft()
        elif op is Op.CLOSE:
            self._close(*SEGMENT.unpack(body))
        elif op is Op.END:
            raise _Ended("its rManager said so")
        else:
            raise ValueError(f"operation {op.name} does not come from an rManager")

    def _close(self, segment: int) -> None:
        if segment in self.segments:
            os.close(self.segments.pop(segment))

    def _admit(self) -> None:
        """Hands everything over to a new rManager, if the one before it is gone."""
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # out of descriptors, most likely: what is kept is worth more
            log("keeper_accepts_nobody", why=str(error))
            time.sleep(ACCEPT_PAUSE_S)
            return
        pid, uid = peer_of(sock)
        if self._owner is not None:
            self._read()  # it may have died a moment ago
        sock.settimeout(HELLO_S)
        try:
            if uid not in (0, os.getuid()):
                _refuse(sock, f"user {uid} may not have the memory of user {os.getuid()}")
            elif self._owner is not None:
                other, _ = peer_of(self._owner)
                _refuse(sock, f"process {other} is this node's rManager, and lives")
            elif self._greets(sock):
                sock.settimeout(HANDOVER_S)
                self._hand_over(sock)
                sock.setblocking(False)
                self._owner, self._inbox = sock, Inbox()
                self._poll.register(sock, select.POLLIN)
                log("keeper_has_rmanager", pid=pid, segments=len(self.segments))
                return
        except OSError as error:
            log("keeper_left_alone", why=str(error))
        sock.close()

    def _greets(self, sock: socket.socket) -> bool:
        """Whether it is an rManager, and one that speaks as we do."""
        hello = packed(Op.HELLO, SEGMENT.pack(VERSION))
        sock.sendall(hello)
        return sock.recv(len(hello), socket.MSG_WAITALL) == hello

    def _hand_over(self, sock: socket.socket) -> None:
        for segment, descriptor in self.segments.items():
            head = packed(Op.SEGMENT, SEGMENT.pack(segment))
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
            sent = sock.sendmsg([head], [rights])
            sock.sendall(head[sent:])
        batch = bytearray()
        for key, record in self.table.items():
            batch += put(key, record)
            if len(batch) >= BATCH_BYTES:
                sock.sendall(batch)
                batch.clear()
        sock.sendall(batch + packed(Op.DONE))


def _refuse(sock: socket.socket, why: str) -> None:
    sock.sendall(packed(Op.REFUSED, why.encode()))


def log(event: str, **facts: object) -> None:
    """As the rManager's own lines, on its stderr."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = {**facts, "event": event, "level": "info", "timestamp": stamp}
    with contextlib.suppress(OSError):
        os.write(2, json.dumps(line).encode() + b"\n")


def listen(path: str) -> socket.socket:
    """A socket at `path`, in place of one at which nobody listens any more."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            if probe.connect_ex(path) in (0, errno.EAGAIN):
                raise
        os.unlink(path)
        sock.bind(path)
    sock.listen(8)
    return sock


def _leave_home() -> None:
    """Out of the rManager's family: neither its end nor Ray's takes the keeper along."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    os.umask(0o077)


def _on_signal(number: int, _frame: object) -> None:
    raise _Ended(f"it was told to, by {signal.Signals(number).name}")


def _unlink(path: str, inode: int) -> None:
    """Unless another keeper has taken the place."""
    with contextlib.suppress(OSError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


def main(node: str, path: str, keep_s: str) -> int:
    _leave_home()
    try:
        listener = listen(path)
    except OSError as error:
        os.write(1, f"cannot listen on {path}: {error}\n".encode())
        return 1
    inode = os.stat(path).st_ino
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:  # every segment takes a descriptor
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    log("keeper_started", node=node, pid=os.getpid())
    keeper = Keeper(listener, float(keep_s))
    try:
        os.write(1, READY)
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere, 1)  # whoever waits for our word need not wait for our end
        keeper.serve()
    except _Ended as reason:
        _unlink(path, inode)
        log("keeper_ended", node=node, why=str(reason), segments=len(keeper.segments))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
