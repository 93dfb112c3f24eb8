"""Queries that are prepared to be asked again, on connections that C alone serves.

Between two kernels' sweeps through the caches every step in Python costs its reading from memory,
so a call by the loop and the engine's thread takes ten times what a socket does. What is prepared
skips both: see native/prepared.h. It is good for a second, so that the ordinary way sees again and
again who asks for what, and until bytes of it are freed or its sequence is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog

from kvfabric.errors import FabricError
from kvfabric.rpc.v1 import wire_pb2
from kvfabric.wire import frames, sockets
from kvfabric_nodes.attention.kernels import Work
from kvfabric_nodes.attention.kernels.library import (
    BEST,
    Counts,
    Prepared,
    address,
    call_of,
    library,
)
from kvfabric_nodes.attention.spans import MAX_POSITION
from kvfabric_nodes.metrics import AttentionTally, Flow
from kvfabric_nodes.sequences.sequence import OpenSequence
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extent
from kvfabric_nodes.store.promises import Reading, Session

if TYPE_CHECKING:
    from kvfabric_nodes.serving.server import WireServer

log = structlog.get_logger(__name__)

LIFE_S = 1.0
RECORD_S = 30  # for the rest of a record that has begun, and for a client to fetch an answer
LOOK_S = 0.001  # how often it is looked whether a kernel is over


@dataclass(slots=True, eq=False)
class _Entry:
    """One that is prepared: what it reads, and the arrays that say so."""

    id: int
    session: int
    until_s: float
    extents: list[Extent]
    kept: list[Any]
    readings: list[Reading] = field(default_factory=list)  # of freed bytes, until it is over
    looked_for: bool = False
    over: bool = False  # nobody computes it, nor will


class Preparations:
    """See the module. On the loop, all but `serve` and `turn`."""

    def __init__(self, core: NodeCore, threads: int, tally: AttentionTally, flow: Flow) -> None:
        """`flow`: of the native kernel."""
        native = library()
        assert native is not None, "ask first whether there is one"
        self._native = native
        self._fence = ctypes.PYFUNCTYPE(None)(("kvfabric_fence", native))  # keeps the GIL
        self._core = core
        self._threads = threads
        self._tally = tally
        self._flow = flow
        self._told = Counts()  # of what was computed, that the tally has
        self._table = native.kvfabric_table()
        if not self._table:
            raise MemoryError("for the table of prepared queries")
        self._entries: deque[_Entry] = deque()  # by their ends
        self._reading: dict[int, set[_Entry]] = {}  # who reads an extent, by its id()
        core.on_freeing.append(self._on_freeing)
        core.on_closed.append(self._on_closed)
        tally.renew = self._renew_tally

    def close(self) -> None:
        """Once no connection is served any more."""
        while self._entries:  # of sessions without connections, over gRPC
            over = self._end(self._entries[0])
            assert over
        self._native.kvfabric_table_free(self._table)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One computes at a time: the connections, or whoever has this."""
        self._native.kvfabric_turn_take(self._table)
        try:
            yield
        finally:
            self._native.kvfabric_turn_give(self._table)

    def prepare(
        self,
        session: Session,
        work: Work,
        window: int,
        extents: list[Extent],
        sequence: OpenSequence | None,
        *,
        ends: bool,
    ) -> int:
        """Its number; 0: there are too many. `work`: of layer 0; its queries and its sight count
        by their sizes alone. `ends`: it is not to see beyond the last piece."""
        now_s = time.monotonic()
        self._forget_old(now_s)
        call, kept = call_of(work, self._threads, BEST)
        if not work.shape.value_offset:
            call.values = call.keys
        what = Prepared(
            call=call,
            owner=session.id,
            until_ns=int((now_s + LIFE_S) * 1e9),
            layers=work.shape.layers,
            layer_bytes=work.shape.layer_bytes,
            window=window,
            end=int(work.first[-1] + work.tokens[-1]) if ends else MAX_POSITION,
        )
        if sequence is not None:
            board = sequence.watched(self._fence)
            kept.append(board)
            what.board, what.cuts = address(board), int(board[-1])
        number: int = self._native.kvfabric_prepare(self._table, ctypes.byref(what))
        if number:
            self._add(_Entry(number, session.id, now_s + LIFE_S, extents, kept))
        return number

    def serve(
        self,
        sock: socket.socket,
        hello: wire_pb2.Frame,
        session: Session,
        server: WireServer,
        kind: str,
    ) -> None:
        """Serves a connection until it ends; in a thread of its own."""
        sock.setblocking(True)
        try:
            head = memoryview(frames.pack(hello))
            sockets.send_all(sock, head, time.monotonic() + RECORD_S)
        except FabricError as error:
            log.warning("attend_ended", why=str(error), kind=kind)
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", RECORD_S, 0))
        self._native.kvfabric_serve(self._table, sock.fileno(), session.id, RECORD_S * 10**9)

    def _add(self, entry: _Entry) -> None:
        self._entries.append(entry)
        for extent in entry.extents:
            self._reading.setdefault(id(extent), set()).add(entry)

    def _forget_old(self, now_s: float) -> None:
        while self._entries and self._entries[0].until_s < now_s and self._end(self._entries[0]):
            pass

    def _end(self, entry: _Entry) -> bool:
        """Nobody begins to compute it any more. Whether it is over; if not, then soon."""
        if not entry.over and not self._native.kvfabric_unprepare(self._table, entry.id):
            entry.over = True
            self._remove(entry)
        elif not (entry.over or entry.looked_for):
            entry.looked_for = True
            asyncio.get_running_loop().call_later(LOOK_S, self._look, entry)
        return entry.over

    def _look(self, entry: _Entry) -> None:
        entry.looked_for = False
        self._end(entry)

    def _remove(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        for key in set(map(id, entry.extents)):
            self._reading[key].discard(entry)
            if not self._reading[key]:
                del self._reading[key]
        for reading in entry.readings:
            self._core.end_reading(reading)

    def _on_freeing(self, extent: Extent) -> None:
        for entry in list(self._reading.get(id(extent), ())):
            if not self._end(entry):
                entry.readings.append(self._core.begin_reading([extent]))

    def _on_closed(self, session: Session, now_s: float) -> None:
        for entry in [entry for entry in self._entries if entry.session == session.id]:
            self._end(entry)

    def _renew_tally(self) -> None:
        counts, told = Counts(), self._told
        self._native.kvfabric_counts(self._table, ctypes.byref(counts))
        tally = self._tally
        tally.prepared += counts.calls - told.calls
        tally.rows += counts.rows - told.rows
        tally.refusals["busy"] += counts.busy - told.busy
        seconds = (counts.kernel_ns - told.kernel_ns) / 1e9
        self._flow.add(counts.read_bytes - told.read_bytes, seconds)
        self._told = counts
