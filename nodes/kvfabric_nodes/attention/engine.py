"""The one thread that computes attention, and the queue before it.

Kernels take their time and release the GIL, so the core's loop goes on meanwhile. What a
task reads is held from its submission until it is computed, whatever becomes of its caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import structlog

from kvfabric.clock import Clock
from kvfabric.errors import Broken, FabricError, Retry
from kvfabric_nodes.metrics import AttentionTally

log = structlog.get_logger(__name__)

MAX_WAITING = 1024
MAX_TOGETHER = 64

Turn = Callable[[], AbstractContextManager[None]]
"""While it is open nobody else computes."""


@dataclass(slots=True, eq=False)
class Task:
    """`compute` runs in the engine's thread, for tasks of one `kind` together where that is not
    None; it leaves its results in `what`. `finish` runs on the loop when that is over."""

    what: Any
    kind: Hashable
    deadline_s: float
    compute: Callable[[Sequence[Any]], None]
    finish: Callable[[], None]
    since_s: float = 0.0
    waited_s: float = 0.0
    error: FabricError | None = None
    done: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def is_like(self, other: Task) -> bool:
        return self.kind is not None and self.kind == other.kind

    def wanted(self, now_s: float) -> bool:
        """Its caller still waits, and its deadline has not passed."""
        return now_s <= self.deadline_s and not self.done.cancelled()

    async def computed(self) -> None:
        """Raises what kept it from it: Retry where its deadline passed first."""
        await self.done
        if self.error is not None:
            raise self.error


class Engine:
    """All methods on the loop."""

    def __init__(
        self, clock: Clock, tally: AttentionTally, turn: Turn = contextlib.nullcontext
    ) -> None:
        self._clock = clock
        self._turn = turn
        self._tally = tally
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Task] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kvfabric-attention", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> None:
        """To be computed, whether somebody waits for it or not. Retry where too many wait."""
        if len(self._waiting) >= MAX_WAITING:
            task.finish()
            self._tally.refusals["full"] += 1
            raise Retry(f"{MAX_WAITING} calls wait for their attention; ask again later")
        task.since_s = self._clock.now()
        with self._changed:
            self._waiting.append(task)
            self._changed.notify()

    async def close(self) -> None:
        """Ends the thread, once what it computes is done."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)
        for task in self._waiting:
            task.error = Retry("the node stops; ask another one")
        self._finish(list(self._waiting))

    def _run(self) -> None:
        while tasks := self._next():
            self._compute(tasks)
            self._loop.call_soon_threadsafe(self._finish, tasks)

    def _compute(self, tasks: Sequence[Task]) -> None:
        """Where it fails for several, it may still be possible for each alone."""
        try:
            with self._turn():
                tasks[0].compute([task.what for task in tasks])
        except Exception as error:
            log.exception("attention_failed", tasks=len(tasks))
            if len(tasks) > 1:
                for task in tasks:
                    self._compute([task])
            else:
                tasks[0].error = Broken(f"the node failed: {error!r}; see its log")

    def _next(self) -> list[Task]:
        """Waits for a task, and takes those that are computed with it. Empty: the end."""
        with self._changed:
            while not self._stopping:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                first = self._take_first()
                if first is not None:
                    return [first, *self._take_alike(first)]
        return []

    def _take_first(self) -> Task | None:
        """The first that is still wanted; those before it are over."""
        now_s = self._clock.now()
        while self._waiting:
            task = self._waiting.popleft()
            task.waited_s = now_s - task.since_s
            if task.wanted(now_s):
                return task
            task.error = Retry(
                f"the deadline passed after {task.waited_s:.3f} s in the queue; give it more "
                "time, or ask another node"
            )
            self._loop.call_soon_threadsafe(self._finish, [task])
        return None

    def _take_alike(self, first: Task) -> list[Task]:
        now_s = self._clock.now()
        alike = (task for task in self._waiting if task.is_like(first) and task.wanted(now_s))
        taken = list(itertools.islice(alike, MAX_TOGETHER - 1))
        for task in taken:
            self._waiting.remove(task)
            task.waited_s = now_s - task.since_s
        return taken

    def _finish(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            task.finish()
            self._tally.waited_s += task.waited_s
            if not task.done.done():  # else its caller has gone
                self._tally.refusals["late"] += isinstance(task.error, Retry)
                task.done.set_result(None)
