"""The rManager's end of its keeper: found or started, asked for what it holds, told what changes.

Starting and taking over may wait, and are for a thread that may. What is sent afterwards never
waits: what the kernel does not take at once did not go out, and the caller decides.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from kvfabric.errors import Conflict, Unreachable
from kvfabric_nodes.keeper import process
from kvfabric_nodes.keeper.process import Inbox, Op

log = structlog.get_logger(__name__)

START_S = 10.0  # for a new keeper to listen
ANSWER_S = 5.0  # between two pieces of what it hands over
HANDOVERS = 3  # attempts: on a busy machine either side may be too slow for the other
OTHER_ENDS_S = 3.0  # for an rManager that was killed to be gone
END_S = 5.0
RETRY_S = 0.05
SEND_BUFFER_BYTES = 4 << 20
_SO_SNDBUFFORCE = 32


@dataclass(frozen=True, slots=True)
class Held:
    """What a keeper handed over. The descriptors are the caller's."""

    segments: dict[int, int] = field(default_factory=dict)
    table: dict[bytes, bytes] = field(default_factory=dict)

    def close(self) -> None:
        for descriptor in self.segments.values():
            os.close(descriptor)
        self.segments.clear()


class KeeperLink:
    """A keeper that is ours alone for as long as this socket is open."""

    def __init__(self, sock: socket.socket, pid: int, pidfd: int) -> None:
        self.sock = sock
        self.pid = pid
        self._pidfd = pidfd
        self._poll = select.poll()
        self._poll.register(sock, select.POLLOUT)

    def roomy(self) -> bool:
        """Whether at most a quarter of what the kernel buffers waits for the keeper."""
        return bool(self._poll.poll(0))

    def send(self, data: bytes | bytearray | memoryview, descriptor: int | None = None) -> int:
        """How much of it the kernel took. OSError where the keeper is gone."""
        try:
            if descriptor is not None:
                return socket.send_fds(self.sock, [data], [descriptor])
            return self.sock.send(data)
        except BlockingIOError:
            return 0

    def kill(self, *, wait: bool = True) -> None:
        """Makes it forget everything, also where it is stopped: at once and for certain."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if wait:
            self._ended()

    def end(self) -> None:
        """Tells it to forget everything and waits until it has."""
        if self.sock.fileno() < 0:
            return
        try:
            self.sock.settimeout(END_S)
            self.sock.sendall(process.packed(Op.END))
            if not self._ended():
                raise TimeoutError
        except OSError:
            self.kill()
        self.close()

    def _ended(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(END_S * 1000))

    def close(self) -> None:
        """Leaves it alone with what it has."""
        if self.sock.fileno() >= 0:
            self.sock.close()
            os.close(self._pidfd)


def take_over(node: str, path: Path, keep_s: float) -> tuple[KeeperLink, Held]:
    """The node's keeper and what it holds; a new one, with nothing, where there is none.

    Raises Conflict where another rManager has it, Unreachable where none can be started.
    """
    until_s = time.monotonic() + OTHER_ENDS_S
    attempts = HANDOVERS
    while True:
        sock = _connect(path)
        if sock is None:
            _start(node, path, keep_s)
            sock = _connect(path)
            if sock is None:
                raise Unreachable(f"the keeper that was started does not listen at {path}")
        link = _link(sock, path)
        try:
            return link, _receive_all(sock)
        except _InUse as error:
            link.close()
            if time.monotonic() >= until_s:
                raise Conflict(
                    f"another rManager has the memory of node {node} ({error}); end it, or give "
                    "this node another name"
                ) from error
            time.sleep(RETRY_S)
        except (OSError, ValueError) as error:
            attempts -= 1
            if attempts > 0 and isinstance(error, OSError):
                log.warning("keeper_asked_again", why=str(error) or "no answer")
                link.close()
                continue
            # Better a node without what it held than none.
            log.warning("keeper_killed", why=str(error) or "no answer", effect="it is started anew")
            link.kill()
            link.close()
            path.unlink(missing_ok=True)


def _connect(path: Path) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(ANSWER_S)
    try:
        sock.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise Unreachable(f"no connection to the keeper at {path}: {error}") from error
    return sock


def _link(sock: socket.socket, path: Path) -> KeeperLink:
    pid, _ = process.peer_of(sock)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        sock.close()
        raise Unreachable(
            f"the keeper at {path} is process {pid}, which is not visible here ({error}); an "
            "rManager and its keeper must share their process ids"
        ) from error
    with contextlib.suppress(OSError):  # root alone may have more than the system's limit
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER_BYTES)
    return KeeperLink(sock, pid, pidfd)


class _InUse(Exception):
    """The keeper has an rManager that lives."""


def _receive_all(sock: socket.socket) -> Held:
    """Says hello and takes in all that is kept."""
    held = Held()
    inbox = Inbox()
    hello = process.SEGMENT.pack(process.VERSION)
    try:
        while inbox.receive(sock):
            for op, body in inbox.operations():
                if op is Op.HELLO:
                    if body != hello:
                        raise ValueError("it speaks another version")
                    sock.sendall(process.packed(Op.HELLO, hello))
                if op is Op.DONE:
                    sock.setblocking(False)
                    return held
                if op is Op.REFUSED:
                    raise _InUse(body.decode(errors="replace"))
                if op is Op.SEGMENT:
                    held.segments[process.SEGMENT.unpack(body)[0]] = inbox.descriptors.popleft()
                elif op is Op.PUT:
                    key, record = process.unpack_put(body)
                    held.table[key] = record
        raise ConnectionAbortedError("it broke off while it handed over what it held")
    except BaseException:
        held.close()
        raise
    finally:
        inbox.close()


def _start(node: str, path: Path, keep_s: float) -> None:
    """Starts a keeper, a process of nobody's, and returns when it listens."""
    command = [sys.executable, "-I", "-S", process.__file__, node, str(path), str(keep_s)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            timeout=START_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unreachable(f"no keeper can be started: {error}") from error
    if done.stdout != process.READY:
        why = done.stdout.decode(errors="replace").strip() or "it ended without a word"
        raise Unreachable(f"no keeper can be started: {why}; see its node's log")
