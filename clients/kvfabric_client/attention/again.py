"""A query that a node has prepared, asked again: one record each way, and no message.

What a span's queries look like is remembered with it. One that comes a second time is prepared
with its answer; from then on it goes by the short way, until the node says that this is gone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from kvfabric.errors import DeadlineExceeded, FabricError, Retry, Unreachable
from kvfabric_client.attention.answers import Traffic
from kvfabric_client.attention.operator import Again, Call
from kvfabric_client.attention.scatter import Arrived, Lane
from kvfabric_client.deadline import Deadline
from kvfabric_client.link import Link
from kvfabric_client.prepared import GONE, Computed, PreparedConnection

KERNEL: Final = "native"  # computes whatever is prepared


@dataclass(frozen=True, slots=True)
class Answer:
    """As an AttendResponse has it."""

    outputs: memoryview
    lse: memoryview
    tokens: list[int]
    kernel: str = KERNEL
    gaps: tuple[()] = ()
    prepared: int = 0


class AgainLane(Lane):
    """The one call to a node that has prepared it. Where that does not serve, the ordinary `calls`
    are made."""

    def __init__(
        self,
        link: Link,
        again: Again,
        calls: Iterable[Call],
        deadline: Deadline,
        traffic: Traffic,
    ) -> None:
        super().__init__(link, "attend", (), deadline)
        self._again: Again | None = again  # None: answered, or on the ordinary way
        self._calls = calls
        self._traffic = traffic
        self._short: PreparedConnection | None = None
        self._short_before = 0

    @property
    def idle(self) -> bool:
        return self._again is None and super().idle

    def fileno(self) -> int:
        if self._again is None or self._short is None:
            return super().fileno()
        return self._short.fileno()

    def send(self) -> None:
        if self._again is not None:
            try:
                self._begin(self._again)
                return
            except DeadlineExceeded:
                raise
            except Retry as error:  # that the node has gone, the ordinary way will tell
                if not isinstance(error, Unreachable):
                    self._again.alike.number, self._again.alike.pays = 0, False
                self._go_ordinary()
        super().send()

    def _begin(self, again: Again) -> None:
        until_s = self.deadline.at_s
        self._short = self.link.take_prepared(until_s)
        if self._short is None:
            raise Retry("the node has no such connections")
        self._short_before = self._short.moved_bytes
        self.ended_s = self.began_s = time.monotonic()
        self._short.begin(
            again.alike.number,
            again.layer,
            again.visible,
            again.vectors,
            again.outputs + again.lse,
            until_s,
        )
        self._traffic.sent_bytes += len(again.vectors)

    def _go_ordinary(self) -> None:
        self._again = None
        self.waiting.extend(self._calls)

    def fetch(self) -> Arrived | None:
        again, short = self._again, self._short
        if again is None or short is None:
            return super().fetch()
        try:
            done = short.finish(self.deadline.at_s)
        except DeadlineExceeded:
            raise
        except Retry:
            done = GONE
        if not isinstance(done, Computed):
            if done == GONE:
                again.alike.number = 0
            self._go_ordinary()
            return None
        self._again = None
        self.ended_s = time.monotonic()
        self.kernel_s += done.kernel_s
        data = done.numbers.data.cast("B")
        cut = 4 * again.outputs
        answer = Answer(data[:cut], data[cut:], [done.tokens])
        return Arrived(self.link, again.asks, answer, None)

    def fail(self, error: FabricError) -> list[Arrived]:
        again, self._again = self._again, None
        if again is None:
            return super().fail(error)
        self._close_short()
        return [Arrived(self.link, again.asks, None, error)]

    def end(self) -> int:
        if self._short is None:
            return super().end()
        if self._again is not None:  # its answer may still come, and be taken for another
            self._close_short()
        self.link.give_prepared(self._short)
        return super().end() + self._short.moved_bytes - self._short_before

    def _close_short(self) -> None:
        if self._short is not None:
            self._short.close()
