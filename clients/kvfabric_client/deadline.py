"""One deadline for everything that a call of the SDK does."""

from __future__ import annotations

import time
from dataclasses import dataclass

from kvfabric.errors import DeadlineExceeded

CLEANUP_S = 1.0


@dataclass(frozen=True, slots=True)
class Deadline:
    """`at_s` is a moment of the monotonic clock."""

    at_s: float

    @classmethod
    def after(cls, timeout_s: float) -> Deadline:
        return cls(time.monotonic() + timeout_s)

    def left_s(self) -> float:
        return max(0.001, self.at_s - time.monotonic())

    def check(self) -> None:
        """Raises DeadlineExceeded once it has passed."""
        if time.monotonic() >= self.at_s:
            raise DeadlineExceeded("the fabric was not fast enough for the deadline of this call")

    def extended(self) -> Deadline:
        """For letting go of what was taken, which must happen even after the deadline."""
        return Deadline(max(self.at_s, time.monotonic() + CLEANUP_S))
