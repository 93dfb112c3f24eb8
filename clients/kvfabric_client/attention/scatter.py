"""Calls to several nodes at once, over connections that stay, answered in order of arrival."""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvfabric.errors import DeadlineExceeded, FabricError, Unreachable
from kvfabric.wire.connection import Connection
from kvfabric_client.attention.answers import Traffic
from kvfabric_client.attention.operator import Ask, Call
from kvfabric_client.deadline import Deadline
from kvfabric_client.link import Link

MAX_UNDER_WAY = 4  # calls to one node; their answers are well below what it keeps for a client


@dataclass(frozen=True, slots=True)
class Arrived:
    """What became of one call."""

    link: Link
    asks: Sequence[Ask]
    answer: Any  # the response, or None where there is an error
    error: FabricError | None


class Lane:
    """The calls to one node, over a connection that nobody else uses meanwhile."""

    def __init__(self, link: Link, name: str, calls: Iterable[Call], deadline: Deadline) -> None:
        self.link = link
        self.name = name
        self.deadline = deadline
        self.waiting = deque(calls)
        self.under_way: deque[tuple[int, Call]] = deque()
        self.kernel_s = 0.0
        self.ended_s = self.began_s = 0.0
        self.connection: Connection | None = None
        self._before = 0

    @property
    def idle(self) -> bool:
        return not (self.under_way or self.waiting)

    @property
    def ready(self) -> bool:
        """Whether its next answer is here already, behind an earlier one."""
        held = self.connection
        return held is not None and bool(self.under_way) and held.has_arrived(self.under_way[0][0])

    def fileno(self) -> int:
        assert self.connection is not None
        return self.connection.fileno()

    def send(self) -> None:
        """As many as may be under way."""
        if not self.waiting:
            return
        if self.connection is None:
            self.connection = self.link.take_lane(self.deadline.at_s)
            self._before = self.connection.moved_bytes
            self.ended_s = self.began_s = time.monotonic()
        while self.waiting and len(self.under_way) < MAX_UNDER_WAY:
            request = self.waiting[0].request
            frame_id = self.connection.begin(self.name, request, self.deadline.at_s)
            self.under_way.append((frame_id, self.waiting.popleft()))

    def fetch(self) -> Arrived | None:
        """Its next answer, which is arriving. None: it leads to another message."""
        assert self.connection is not None
        frame_id, call = self.under_way[0]
        answer, failure = None, None
        try:
            frame = self.connection.finish(frame_id, self.deadline.at_s)
            answer = getattr(frame, f"{self.name}_response")
            self.kernel_s += getattr(answer, "kernel_us", 0) / 1e6
        except (DeadlineExceeded, Unreachable):
            raise
        except FabricError as error:  # of this call alone
            failure = error
        self.under_way.popleft()
        self.ended_s = time.monotonic()
        return Arrived(self.link, call.asks, answer, failure)

    def fail(self, error: FabricError) -> list[Arrived]:
        """Nothing more comes from this node: what its other calls come to."""
        rest = [*(call for _, call in self.under_way), *self.waiting]
        if self.connection is not None:
            self.connection.close()  # else late answers would come before later ones
        self.under_way.clear()
        self.waiting.clear()
        return [Arrived(self.link, call.asks, None, error) for call in rest]

    def end(self) -> int:
        """Gives the connection back; answers how many bytes went over it."""
        if self.connection is None:
            return 0
        if not self.idle:  # nobody waits for what still comes
            self.connection.close()
        self.link.give_lane(self.connection)
        return self.connection.moved_bytes - self._before


def scatter(
    lanes: list[Lane],
    deadline: Deadline,
    traffic: Traffic,
    meanwhile: Callable[[], None],
    take: Callable[[Arrived], None],
) -> None:
    """Sends everything, runs `meanwhile`, and has what the nodes answer taken as it comes. The
    calls of a node that has not answered by the deadline, or has gone, fail with the error that
    says so."""
    try:
        for lane in lanes:
            _try(lane, lane.send, take)
        meanwhile()
        while waiting := [lane for lane in lanes if not lane.idle]:
            for lane in _arriving(waiting, deadline):
                _answers(lane, take)
    finally:
        _account(lanes, traffic)


def _arriving(waiting: list[Lane], deadline: Deadline) -> list[Lane]:
    """Those that have something to tell; all of them once time is over. Who waits for one alone
    does so by taking its answer."""
    if len(waiting) == 1:
        return waiting
    if at_once := [lane for lane in waiting if lane.ready]:
        return at_once
    poll, by_fd = select.poll(), {lane.fileno(): lane for lane in waiting}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    return [by_fd[fd] for fd, _ in poll.poll(deadline.left_s() * 1000)] or waiting


def _answers(lane: Lane, take: Callable[[Arrived], None]) -> None:
    """The next answer of a node, and those that came with it."""
    while True:
        _try(lane, lane.fetch, take)
        _try(lane, lane.send, take)
        if not lane.ready:
            return


def _try(lane: Lane, act: Callable[[], Arrived | None], take: Callable[[Arrived], None]) -> None:
    try:
        arrived = act()
    except (DeadlineExceeded, Unreachable) as error:
        for failed in lane.fail(error):
            take(failed)
        return
    if arrived is not None:
        take(arrived)


def _account(lanes: list[Lane], traffic: Traffic) -> None:
    traffic.rounds += 1
    traffic.wire_bytes += sum([lane.end() for lane in lanes])
    if lanes:
        last = max(lanes, key=lambda lane: lane.ended_s)
        traffic.kernel_s += last.kernel_s
        traffic.network_s += max(0.0, last.ended_s - last.began_s - last.kernel_s)
