"""What it costs that the node which attends is another: over TCP, beside bare sockets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

from kvfabric_client.bench.attention.field import Field
from kvfabric_client.bench.attention.kernels import attend_next, warm
from kvfabric_client.bench.attention.plan import ADDED, REMOTE_TOKENS, TOTAL, target_of
from kvfabric_client.bench.attention.shapes import MAIN
from kvfabric_client.bench.bare import BareSocket
from kvfabric_client.bench.rounds import Case, together

MILLI, MICRO = 1e3, 1e6
CALLS: Final = 16
ROUND_TRIPS: Final = 2  # that a remote call may add
UNITS: Final = {ADDED: "us", TOTAL: "ms"}


class Remote:
    """Calls and bare round trips take turns, so that both meet the same sleeping processes."""

    def __init__(self, field: Field, bare: BareSocket) -> None:
        self._field = field
        self._bare = bare
        self._asker = field.asker(field.tcp)

    def cases(self, names: Sequence[str]) -> list[Case]:
        if names:
            warm(self._asker, self._field, MAIN, REMOTE_TOKENS)
        both = {ADDED: self._added, TOTAL: self._total}
        return [
            Case(name, 0, UNITS[name], *together(both[name]), target_of(name)) for name in names
        ]

    def _added(self) -> tuple[float, float]:
        """Beyond the kernel; two bare round trips with as large messages."""
        added, trips = [], []
        for _ in range(CALLS):
            answer = attend_next(self._asker, self._field, MAIN, REMOTE_TOKENS)
            added.append(answer.total_s - answer.kernel_s)
            back = memoryview(bytearray(answer.received_bytes))
            trips.append(self._bare.call(bytes(answer.sent_bytes), back))
        return (
            statistics.median(added) * MICRO,
            ROUND_TRIPS * statistics.median(trips) * MICRO,
        )

    def _total(self) -> tuple[float, float]:
        answers = [attend_next(self._asker, self._field, MAIN, REMOTE_TOKENS) for _ in range(CALLS)]
        return (
            statistics.median(answer.total_s for answer in answers) * MILLI,
            statistics.median(answer.kernel_s for answer in answers) * MILLI,
        )
