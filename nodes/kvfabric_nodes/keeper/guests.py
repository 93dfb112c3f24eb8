"""Which processes map which segments: now, for the keeper; and from before, until they have gone.

A guest is gone when its process is, when its session ends (its sockets are closed), or, after
a restart, when its client says that nothing of that session touches memory any more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from kvfabric.cluster.processes import of
from kvfabric_nodes.keeper.records import Guest, encode_guest, guest_key
from kvfabric_nodes.store.promises import Session


class Table(Protocol):
    """Where guests are recorded."""

    def put(self, key: bytes, record: bytes) -> None: ...
    def delete(self, key: bytes) -> None: ...


def guests_of(token: bytes, pid: int, segments: Iterable[int]) -> list[Guest]:
    """What a process is that is given these segments now."""
    process = of(pid) if pid else None
    started_ticks = process.started_ticks if process else 0
    return [Guest(token, segment, pid, started_ticks) for segment in segments]


def gone(guest: Guest) -> bool:
    """Whether that process has ended. One that is not visible here is never known to have."""
    if not guest.pid:
        return False
    process = of(guest.pid)
    if process is not None:
        return process.started_ticks != guest.started_ticks
    try:  # its first thread may have ended before the others
        return len(os.listdir(f"/proc/{guest.pid}/task")) <= 1
    except OSError:
        return True


class Guests:
    """See the module. `close` ends a session that stands for guests of an earlier start."""

    def __init__(
        self,
        guests: Iterable[Guest],
        former: dict[int, Session],
        close: Callable[[Session], None],
        is_gone: Callable[[Guest], bool] = gone,
    ) -> None:
        self._close = close
        self._is_gone = is_gone
        self._frozen = dict(former)  # by segment
        self._former = {guest_key(guest): guest for guest in guests}
        self._now: dict[bytes, dict[bytes, Guest]] = {}  # by session

    @property
    def frozen(self) -> int:
        """Segments that are not granted anew yet."""
        return len(self._frozen)

    def all(self) -> list[Guest]:
        now = [guest for guests in self._now.values() for guest in guests.values()]
        return [*self._former.values(), *now]

    def mapped(self, guests: Sequence[Guest], table: Table) -> None:
        """These are about to be given their segments."""
        for guest in guests:
            key = guest_key(guest)
            self._now.setdefault(guest.token, {})[key] = guest
            table.put(key, encode_guest(guest))

    def unmapped(self, token: bytes, segments: Iterable[int], table: Table) -> None:
        """The session no longer maps these."""
        wanted = set(segments)
        for key, guest in list(self._now.get(token, {}).items()):
            if guest.segment in wanted:
                del self._now[token][key]
                table.delete(key)

    def ended(self, token: bytes, table: Table) -> None:
        """The session has ended, and maps nothing any more."""
        for key in self._now.pop(token, ()):
            table.delete(key)

    def ended_before(self, tokens: Iterable[bytes], table: Table) -> None:
        """Sessions of an earlier start of which nothing touches memory any more."""
        ended = set(tokens)
        self._let_go([g for g in self._former.values() if g.token in ended], table)

    def look(self, table: Table) -> None:
        """Lets go of what belonged to processes that have ended."""
        known: dict[tuple[int, int], bool] = {}  # of a process, which may map every segment
        gone: list[Guest] = []
        for guest in self._former.values():
            process = guest.pid, guest.started_ticks
            if process not in known:
                known[process] = self._is_gone(guest)
            if known[process]:
                gone.append(guest)
        self._let_go(gone, table)

    def _let_go(self, guests: Iterable[Guest], table: Table) -> None:
        for guest in guests:
            table.delete(guest_key(guest))
            del self._former[guest_key(guest)]
        awaited = {guest.segment for guest in self._former.values()}
        for segment in [s for s in self._frozen if s not in awaited]:
            self._close(self._frozen.pop(segment))
