"""Named places where a process can be made to die or stop: how faults are tried at every step.

Nothing happens unless KVFABRIC_FAILPOINT says so: `NAME=kill` is kill -9 of the own process,
`NAME=stop` is SIGSTOP; `NAME=kill:3` at the third time. A place costs one comparison.
"""

from __future__ import annotations

import os
import signal

from kvfabric.errors import Refused

ENVIRONMENT = "KVFABRIC_FAILPOINT"

POINTS: dict[str, str] = {
    "borrow.asked": "debtor: the manager has named creditors, none is asked yet",
    "borrow.reserved": "debtor: a creditor has reserved the space",
    "borrow.seen": "debtor: the creditor's replicas are seen, its own are still here",
    "borrow.dropped": "debtor: its own replicas are gone",
    "lend.reserved": "creditor: space is reserved, the debtor does not know yet",
    "lend.sealed": "creditor: the shards are sealed, nobody has been told",
    "recall.asked": "creditor: about to ask for its memory",
    "recall.heard": "debtor: knows that it must move",
    "recall.returned": "debtor: about to say that a loan is returned",
    "pull.started": "destination: about to read from the source",
    "pull.reserved": "destination: has reserved what it is about to read",
    "pull.sealed": "destination: has sealed a batch",
    "pull.reading": "source: has leased what is read",
    "drop.told": "source: was told to drop what was copied",
    "state.frozen": "source: a state answers nobody, no other node knows of it",
    "state.adopted": "destination: holds a state, its source does not know",
    "state.agreed": "source: knows that a state is held elsewhere, and has not let go",
    "state.left": "source: has let go of a state",
    "keep.handed": "source: who has the copies has taken pins and groups over, its own are here",
}

_ACTIONS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class Failpoints:
    """What one process was told to do, and how often it has come by."""

    def __init__(self, setting: str) -> None:
        """Refused for a setting that names no place or no action."""
        self.armed, _, what = setting.partition("=")
        action, _, times = what.partition(":")
        if setting and (
            self.armed not in POINTS or action not in _ACTIONS or not (times or "1").isdigit()
        ):
            raise Refused(
                f"{ENVIRONMENT}={setting!r}: take NAME=kill or NAME=stop, with one of "
                f"{', '.join(POINTS)}"
            )
        self._signal = _ACTIONS.get(action, signal.SIGKILL)
        self._times_left = int(times or "1")

    def reach(self, point: str) -> None:
        """The process is at this place."""
        if point != self.armed:
            return
        self._times_left -= 1
        if not self._times_left:
            os.kill(os.getpid(), self._signal)


reach = Failpoints(os.environ.get(ENVIRONMENT, "")).reach
