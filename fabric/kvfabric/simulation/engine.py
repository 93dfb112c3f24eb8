"""Simulated time: events in the order of their time, and tasks that wait for one another.

Equal times keep the order in which they were planned, and chance comes from one seeded
Random, so that a seed gives one history. Its trace is hashed as it goes.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Coroutine, Generator
from random import Random
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Event:
    """Something planned; `cancel` makes it not happen."""

    __slots__ = ("args", "what")

    def __init__(self, what: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.what: Callable[..., object] | None = what
        self.args = args

    def cancel(self) -> None:
        self.what = None


class Promise(Generic[T]):
    """A value that comes later, to be awaited by a task. Only the first `keep` counts."""

    __slots__ = ("_simulation", "_waiting", "kept", "value")

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._waiting: list[Callable[[T], object]] = []
        self.kept = False
        self.value: T | None = None

    def keep(self, value: T) -> None:
        if self.kept:
            return
        self.kept, self.value = True, value
        for told in self._waiting:
            self._simulation.after(0.0, told, value)
        self._waiting.clear()

    def then(self, told: Callable[[T], object]) -> None:
        """Told of the value in an event of its own."""
        if self.kept:
            self._simulation.after(0.0, told, self.value)
        else:
            self._waiting.append(told)

    def __await__(self) -> Generator[Promise[T], T, T]:
        return (yield self)


class Task:
    """A coroutine that awaits promises and nothing else. `kill` ends it where it waits."""

    __slots__ = ("_coroutine", "done")

    def __init__(self, simulation: Simulation, coroutine: Coroutine[Any, Any, None]) -> None:
        self._coroutine = coroutine
        self.done = False
        simulation.after(0.0, self._step, None)

    def kill(self) -> None:
        if not self.done:
            self.done = True
            self._coroutine.close()

    def _step(self, value: object) -> None:
        if self.done:
            return
        try:
            promise = self._coroutine.send(value)
        except StopIteration:
            self.done = True
            return
        promise.then(self._step)


class Simulation:
    """See the module."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now_s = 0.0
        self.happened = 0  # events so far
        self._planned = 0
        self._heap: list[tuple[float, int, Event]] = []
        self._trace = hashlib.blake2b(digest_size=16)

    def at(self, at_s: float, what: Callable[..., object], *args: Any) -> Event:
        """Plans a call; one for the past comes now."""
        event = Event(what, args)
        self._planned += 1
        heapq.heappush(self._heap, (max(at_s, self.now_s), self._planned, event))
        return event

    def after(self, delay_s: float, what: Callable[..., object], *args: Any) -> Event:
        return self.at(self.now_s + delay_s, what, *args)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> Task:
        """Begins at the present time, in an event of its own."""
        return Task(self, coroutine)

    def sleep(self, seconds: float) -> Promise[None]:
        promise: Promise[None] = Promise(self)
        self.after(seconds, promise.keep, None)
        return promise

    def every(self, seconds: float, what: Callable[[], object], phase_s: float = 0.0) -> None:
        """Calls again and again, for good, beginning after `phase_s`."""

        def again() -> None:
            what()
            self.after(seconds, again)

        self.after(phase_s, again)

    def note(self, text: str) -> None:
        """One line of the history, into its hash."""
        self._trace.update(f"{self.now_s:.9f} {text}\n".encode())

    def digest(self) -> str:
        """Equal for equal histories."""
        return self._trace.hexdigest()

    def run(self, until_s: float, observe: Callable[[], object] | None = None) -> None:
        """All events up to then; `observe` is called after each."""
        while self._heap and self._heap[0][0] <= until_s:
            self.step()
            if observe is not None:
                observe()
        self.now_s = max(self.now_s, until_s)

    def close(self) -> None:
        """Nothing happens any more."""
        for _, _, event in self._heap:
            task = getattr(event.what, "__self__", None)
            if isinstance(task, Task):
                task.kill()
        self._heap.clear()

    def step(self) -> None:
        """The next event."""
        at_s, _, event = heapq.heappop(self._heap)
        self.now_s = at_s
        if event.what is None:
            return
        self.happened += 1
        event.what(*event.args)
