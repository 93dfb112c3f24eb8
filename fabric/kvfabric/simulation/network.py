"""The simulated network: link classes, and what may befall a message.

A message takes its link's latency and its bytes' time, waits its turn at both ends' network
cards, and may be lost, doubled, delayed past later ones, or stopped by a partition. Who is
dead hears nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvfabric.simulation.cards import Cards
from kvfabric.simulation.engine import Promise, Simulation


@dataclass(frozen=True, slots=True)
class LinkClass:
    """How far two nodes are from each other."""

    name: str
    latency_s: float  # one way
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Links:
    """The classes of a cluster, nearest first."""

    host: LinkClass
    rack: LinkClass
    far: LinkClass


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node stands."""

    host: str
    rack: str


Handler = Callable[[str, str, Any], Any]
"""Caller, the call's name, its request: the response, or None where the callee does not answer."""


class Network:
    """See the module. `loss`, `doubles` and `disorder` are chances per message."""

    def __init__(self, simulation: Simulation, links: Links) -> None:
        self.loss = 0.0
        self.doubles = 0.0
        self.disorder = 0.0
        self.delay_s = 0.05  # at most, of a message that is out of order
        self.cut: set[frozenset[str]] = set()  # pairs that do not hear each other
        self.slow: dict[str, float] = {}  # by so many times
        self.sent = 0
        self.sent_bytes = 0
        self._simulation = simulation
        self._links = links
        self._places: dict[str, Place] = {}
        self._handlers: dict[str, Handler] = {}
        self._cards = Cards(simulation)
        self._lost_s: dict[frozenset[str], float] = {}  # by pair
        self._lives: dict[str, int] = {}  # of those who hear; each number once
        self._last_life = 0

    def join(self, name: str, place: Place, handler: Handler) -> None:
        """From now on `name` can be called; again for another life of it."""
        self._places[name] = place
        self._handlers[name] = handler
        self._last_life += 1
        self._lives[name] = self._last_life

    def leave(self, name: str) -> None:
        self._handlers.pop(name, None)
        self._lives.pop(name, None)

    def alive(self, name: str) -> bool:
        return name in self._handlers

    def link(self, source: str, target: str) -> LinkClass:
        here, there = self._places[source], self._places[target]
        if here.host == there.host:
            return self._links.host
        return self._links.rack if here.rack == there.rack else self._links.far

    def reachable(self, source: str, target: str) -> bool:
        return (
            source in self._handlers
            and target in self._handlers
            and (source == target or frozenset((source, target)) not in self.cut)
        )

    def since_lost_s(self, one: str, other: str) -> float:
        """For how long no message between these two was lost."""
        pair = frozenset((one, other))
        return self._simulation.now_s - self._lost_s.get(pair, float("-inf"))

    def call(
        self, source: str, target: str, name: str, request: Any, timeout_s: float
    ) -> Promise[Any]:
        """The response, or None after the timeout. What was lost may have been carried out."""
        answer: Promise[Any] = Promise(self._simulation)
        self._simulation.after(timeout_s, answer.keep, None)

        def arrive() -> None:
            handler = self._handlers.get(target)
            if handler is None:
                return
            self._simulation.note(f"{source}>{target} {name}")
            response = handler(source, name, request)
            if response is not None:
                self._send(target, source, lambda: answer.keep(response))

        self._send(source, target, arrive)
        return answer

    def carry(self, source: str, target: str, size_bytes: int, rate: float = 0.0) -> Promise[bool]:
        """Moves a payload; whether it came through. `rate`: at most so many bytes a second.

        Both cards are busy with it at the link's rate; a throttled one leaves gaps for others.
        """
        done: Promise[bool] = Promise(self._simulation)
        if not self.reachable(source, target):
            self._simulation.after(self.delay_s, done.keep, False)
            return done
        link = self.link(source, target)
        factor = max(self.slow.get(source, 1.0), self.slow.get(target, 1.0))
        takes_s = size_bytes / link.bytes_per_s * factor
        gaps_s = max(0.0, size_bytes / rate - takes_s) if rate else 0.0
        lives = (self._lives[source], self._lives[target])
        self.sent_bytes += size_bytes

        def finish() -> None:
            same = lives == (self._lives.get(source), self._lives.get(target))
            done.keep(same and self.reachable(source, target))

        def sent() -> None:
            self._simulation.after(gaps_s + link.latency_s * factor, finish)

        self._cards.carry(source, target, takes_s, sent)
        return done

    def _send(self, source: str, target: str, arrive: Callable[[], None]) -> None:
        random = self._simulation.random
        self.sent += 1
        if not self.reachable(source, target) or (self.loss and random.random() < self.loss):
            self._lost_s[frozenset((source, target))] = self._simulation.now_s
            return
        copies = 2 if self.doubles and random.random() < self.doubles else 1
        for _ in range(copies):
            self._simulation.after(self._latency_s(source, target), self._deliver(target, arrive))

    def _deliver(self, target: str, arrive: Callable[[], None]) -> Callable[[], None]:
        """A message to a life of `target` that has ended meanwhile is lost."""
        life = self._lives[target]

        def deliver() -> None:
            if self._lives.get(target) == life:
                arrive()

        return deliver

    def _latency_s(self, source: str, target: str) -> float:
        random = self._simulation.random
        factor = max(self.slow.get(source, 1.0), self.slow.get(target, 1.0))
        latency_s = self.link(source, target).latency_s * factor * (1 + 0.2 * random.random())
        if self.disorder and random.random() < self.disorder:
            latency_s += random.random() * self.delay_s
        return latency_s
