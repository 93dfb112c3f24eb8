"""The processes that one `kvfabric up` started, found and ended without mistaking any other.

Every process that the launcher starts, and every one that those start, inherits a mark in
its environment: one random word per `up`. Ray's workers rewrite their command line, are
restarted under new ids and outlive a raylet that was killed for some seconds; the mark tells
them apart from the rest of the machine nevertheless. A signal goes to a pidfd whose mark was
read after it was opened, so that it cannot hit a process that got the id later.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MARK_VARIABLE = "KVFABRIC_UP"


@dataclass(frozen=True, slots=True)
class Process:
    """A process for good: an id is used again, an id with its start time is not."""

    pid: int
    started_ticks: int  # clock ticks from the machine's boot to the process's start

    @property
    def alive(self) -> bool:
        return _started_ticks(self.pid) == self.started_ticks


def of(pid: int) -> Process | None:
    """The process with that id now; None if there is none, or it only waits to be reaped."""
    started_ticks = _started_ticks(pid)
    return None if started_ticks is None else Process(pid, started_ticks)


def marked(mark: str) -> list[Process]:
    """All living processes of this user with that mark, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _has_mark(int(entry.name), mark):
            process = of(int(entry.name))
            if process is not None:
                found.append(process)
    return sorted(found, key=lambda process: (process.started_ticks, process.pid))


def end(mark: str, *, grace_s: float, kill_s: float) -> tuple[int, list[Process]]:
    """Ends all marked processes: SIGTERM, after `grace_s` SIGKILL, and `kill_s` to be gone.

    Returns how many had to be killed, and those that live on in spite of it.
    """
    found = marked(mark)
    _signal_all(found, mark, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for process in found:
        wait(process, deadline)
    killed: set[Process] = set()
    deadline = time.monotonic() + kill_s
    while (rest := marked(mark)) and time.monotonic() < deadline:
        _signal_all(rest, mark, signal.SIGKILL)  # again and again: they start others meanwhile
        killed.update(rest)
        time.sleep(0.05)
    return len(killed), rest


def wait(process: Process, deadline: float) -> bool:
    """Waits for a process to end, until `deadline` (monotonic); says whether it has."""
    with _pidfd(process.pid) as descriptor:
        if descriptor is not None and process.alive:
            select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
    return not process.alive


def signal_one(process: Process, mark: str, number: signal.Signals) -> bool:
    """Signals that process if it still lives and carries the mark; says whether it did."""
    with _pidfd(process.pid) as descriptor:
        if descriptor is None or not process.alive or not _has_mark(process.pid, mark):
            return False
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)
            return True
    return False


def _signal_all(processes: list[Process], mark: str, number: signal.Signals) -> None:
    for process in processes:
        signal_one(process, mark, number)


@contextmanager
def _pidfd(pid: int) -> Iterator[int | None]:
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _has_mark(pid: int, mark: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone, a zombie, or another user's: not ours
        return False
    return f"{MARK_VARIABLE}={mark}".encode() in environment.split(b"\0")


def _started_ticks(pid: int) -> int | None:
    """None for a process that is gone or only waits to be reaped."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rsplit(")", 1)[1].split()  # the name before it may hold anything
    return None if fields[0] in "ZX" else int(fields[19])
