"""One deadline for everything that a call of the SDK does."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from kvfabric.errors import DeadlineExceeded, Refused

CLEANUP_S = 1.0
MAX_TIMEOUT_S = 86400.0
MAX_DURATION_S = 30 * 86400.0  # longer ones do not fit a message


@dataclass(frozen=True, slots=True)
class Deadline:
    """`at_s` is a moment of the monotonic clock."""

    at_s: float

    @classmethod
    def after(cls, timeout_s: float) -> Deadline:
        """Refused where it is no duration; more than a day is a day."""
        if not timeout_s >= 0:
            raise Refused(f"a timeout of {timeout_s} s; give seconds, at least 0")
        return cls(time.monotonic() + min(timeout_s, MAX_TIMEOUT_S))

    def left_s(self) -> float:
        return max(0.001, self.at_s - time.monotonic())

    def part(self, share: float) -> Deadline:
        """An earlier one, after so much of what is left."""
        return Deadline(time.monotonic() + share * self.left_s())

    def check(self) -> None:
        """Raises DeadlineExceeded once it has passed."""
        if time.monotonic() >= self.at_s:
            raise DeadlineExceeded("the fabric was not fast enough for the deadline of this call")

    def extended(self) -> Deadline:
        """For letting go of what was taken, which must happen even after the deadline."""
        return Deadline(max(self.at_s, time.monotonic() + CLEANUP_S))


def milliseconds(duration_s: float) -> int:
    """A duration for a message, where 0 has a meaning of its own: rounded up, at most a month."""
    if not duration_s >= 0:
        raise Refused(f"a duration of {duration_s} s; give seconds, at least 0")
    return math.ceil(min(duration_s, MAX_DURATION_S) * 1000)
