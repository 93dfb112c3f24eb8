"""Engines with continuous batching, in coarse steps of time; their memory is somebody else's.

First come, first served: a request is admitted when its KV has room, grows by a token with
every decode step, and where no room comes the latest of its instance is preempted, loses its
KV and has to be prefilled anew, as in vLLM. This is the same with and without lending.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvfabric.simulation.parameters import LINKS, Setup
from kvfabric.simulation.workload import Request

WATERMARK = 0.01  # of a node's blocks stays free when a request is admitted, as in vLLM


class Memory(Protocol):
    """One node's memory, as its engine asks for it."""

    def room(self, blocks: int, owed: int) -> bool:
        """Whether so many more blocks may be admitted; `owed` are promised to others already."""

    def open(self, request: int, tokens: int) -> bool:
        """Begins a sequence whose prompt has so many tokens; False: not now."""

    def grow(self, request: int, tokens: int) -> int:
        """Room for `tokens` of KV in all, as far as there is; answers for how many there is.

        Full blocks are sealed as they are filled. Where room is lacking it is sought, so that
        the same call later may have more.
        """

    def close(self, request: int, *, drop: bool = True) -> None:
        """Ends a sequence; its blocks are free, or stay as cache."""

    def lent(self) -> Mapping[int, int]:
        """Bytes that lie at other nodes, by their numbers."""

    def stepped(self, batch: int, tokens: int, seconds: float, steps: float, waiting: int) -> None:
        """What the engine measured: `steps` of so many seconds."""


@dataclass(slots=True, eq=False)
class Served:
    """A request on its way."""

    request: Request
    produced: int = 0  # of its output
    slot: int = -1  # in the arrays, while it runs
    covered: int = 0  # KV that there is room for, while it is brought in
    filling_since_s: float = 0.0
    stalled_since_s: float = -1.0  # it lacks room since then; negative: it does not
    preempted: int = 0

    @property
    def filled(self) -> int:
        """KV to be brought in before it runs."""
        return self.request.prompt + self.produced


@dataclass(slots=True)
class Tally:
    """What came of it."""

    produced: int = 0  # tokens, since they are counted
    served_tokens: int = 0  # prompts and outputs of what finished since then
    finished: int = 0
    rejected: int = 0
    preempted: int = 0
    longest: int = 0  # context of a finished request
    waited_s: float = 0.0  # summed over first admissions
    admitted: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)  # finished


class Engines:
    """All instances of a cluster. `tick` moves them on by a quantum."""

    def __init__(
        self,
        setup: Setup,
        memories: Sequence[Memory],
        arrivals: Iterator[Request],
        capacity_blocks: int,
        later: Callable[[float, Callable[..., object], Any], object],
    ) -> None:
        self.tally = Tally()
        self.queues: list[deque[Served]] = [deque() for _ in memories]
        self._setup = setup
        self._engine = setup.engine
        self._memories = memories
        self._arrivals = arrivals
        self._next = next(arrivals, None)
        self._capacity_blocks = capacity_blocks
        self._later = later
        self._filling: list[dict[int, Served]] = [{} for _ in memories]
        self._running: list[dict[int, Served]] = [{} for _ in memories]
        self._coming = 0  # preempted ones in prefill
        self._steps: NDArray[np.float64] = np.zeros(len(memories))  # begun, not finished
        self._slots: list[Served | None] = []
        self._free_slots: list[int] = []
        self._node: NDArray[np.int64] = np.zeros(0, np.int64)
        self._tokens: NDArray[np.int64] = np.zeros(0, np.int64)
        self._covered: NDArray[np.int64] = np.zeros(0, np.int64)
        self._goal: NDArray[np.int64] = np.zeros(0, np.int64)
        self._make_slots(1024)

    @property
    def open_sequences(self) -> int:
        return sum(map(len, self._running)) + sum(map(len, self._filling))

    @property
    def idle(self) -> bool:
        """Nothing is left to do."""
        return (
            self._next is None
            and not self._coming
            and not self.open_sequences
            and not any(self.queues)
        )

    def tick(self, now_s: float) -> None:
        """One quantum ends now."""
        while self._next is not None and self._next.arrival_s <= now_s:
            self._arrive(self._next)
            self._next = next(self._arrivals, None)
        self._decode(now_s)
        for node in range(len(self._memories)):
            if self._filling[node]:
                self._fill(node, now_s)
            if self.queues[node]:
                self._admit(node, now_s)

    def crashed(self, node: int, now_s: float) -> None:
        """An instance lost its memory: its requests begin anew."""
        for served in [*self._running[node].values(), *self._filling[node].values()]:
            self._again(node, served, now_s)

    # Arrival and admission

    def _arrive(self, request: Request) -> None:
        blocks = self._blocks(request.tokens)
        reach = len(self._memories) if self._setup.lending else 1
        if blocks > self._capacity_blocks * reach * (1 - WATERMARK):
            self.tally.rejected += 1  # it could never be served
            return
        self.queues[request.node].append(Served(request))

    def _admit(self, node: int, now_s: float) -> None:
        queue, memory = self.queues[node], self._memories[node]
        while queue:
            busy = len(self._running[node]) + len(self._filling[node])
            if busy >= self._engine.most_running:
                return
            served = queue[0]
            owed = sum(
                self._blocks(each.filled) - self._blocks(each.covered)
                for each in self._filling[node].values()
            )
            spare = int(self._capacity_blocks * WATERMARK) if busy else 0
            if not memory.room(self._blocks(served.filled + 1) + spare, owed):
                return
            if not memory.open(served.request.id, served.filled):
                return
            queue.popleft()
            served.filling_since_s = now_s
            self._filling[node][served.request.id] = served
            if not served.preempted:
                self.tally.admitted += 1
                self.tally.waited_s += now_s - served.request.arrival_s

    def _fill(self, node: int, now_s: float) -> None:
        engine, memory = self._engine, self._memories[node]
        for number, served in list(self._filling[node].items()):
            if number not in self._filling[node]:
                continue  # preempted for another's sake
            came_s = now_s - served.filling_since_s + self._setup.quantum_s
            came = int(came_s * engine.fill_bytes_per_s / engine.token_bytes)
            wanted = min(served.filled, came)
            covered = served.covered = memory.grow(number, wanted)
            if covered < wanted:
                # What could not be taken in is sent later.
                lag = (wanted - covered) * engine.token_bytes / engine.fill_bytes_per_s
                served.filling_since_s += lag
                self._stall(node, served, now_s)
            else:
                served.stalled_since_s = -1.0
                if wanted == served.filled:
                    del self._filling[node][number]
                    self._run(node, served, covered)

    def _run(self, node: int, served: Served, covered: int) -> None:
        if not self._free_slots:
            self._make_slots(len(self._slots))
        slot = served.slot = self._free_slots.pop()
        self._slots[slot] = served
        self._running[node][served.request.id] = served
        self._node[slot] = node
        self._tokens[slot] = served.filled
        self._covered[slot] = covered
        self._goal[slot] = served.request.tokens

    # Decoding

    def _decode(self, now_s: float) -> None:
        live = np.flatnonzero(self._goal)
        if not len(live):
            return
        nodes = len(self._memories)
        steps = self._advance(np.bincount(self._node[live], minlength=nodes), live)
        ahead = np.minimum(self._tokens[live] + steps[self._node[live]], self._goal[live])
        for slot, wanted in zip(
            live[ahead > self._covered[live]].tolist(),
            ahead[ahead > self._covered[live]].tolist(),
            strict=True,
        ):
            self._lengthen(slot, wanted, now_s)
        live = np.flatnonzero(self._goal)  # without those that were preempted
        goal = np.minimum(self._goal[live], self._covered[live])
        grown = np.minimum(self._tokens[live] + steps[self._node[live]], goal)
        made = int((grown - self._tokens[live]).sum())
        self._tokens[live] = grown
        if now_s > self._setup.warm_s:
            self.tally.produced += made
        for slot in live[grown >= self._goal[live]].tolist():
            self._finish(slot, now_s)

    def _advance(self, batch: NDArray[np.int64], live: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many steps each instance makes in the quantum; tells the memories."""
        engine, quantum_s = self._engine, self._setup.quantum_s
        nodes = len(self._memories)
        tokens = np.bincount(self._node[live], weights=self._tokens[live], minlength=nodes)
        here = tokens.copy()  # of KV attended at each node, for whomever
        slowest = np.zeros(nodes)  # of the parts that lie elsewhere
        links_s = np.zeros(nodes)
        for node, memory in enumerate(self._memories):
            for creditor, size_bytes in memory.lent().items():
                part = size_bytes / engine.token_bytes
                here[node] -= part
                here[creditor] += part
                slowest[node] = max(slowest[node], part)
                links_s[node] = 2 * engine.layers * LINKS.rack.latency_s
        linear_s = np.maximum(engine.least_step_s, batch * engine.seconds_per_batched)
        attend = np.maximum(np.maximum(here, slowest), 0.0)
        step_s = linear_s + attend * engine.seconds_per_token + links_s
        made = np.where(batch > 0, quantum_s / step_s, 0.0)
        for node, memory in enumerate(self._memories):
            memory.stepped(
                int(batch[node]),
                int(tokens[node]),
                float(step_s[node]),
                float(made[node]),
                len(self.queues[node]),
            )
        self._steps = np.where(batch > 0, self._steps + made, 0.0)
        whole = self._steps.astype(np.int64)
        self._steps -= whole
        return whole

    def _lengthen(self, slot: int, wanted: int, now_s: float) -> None:
        served = self._slots[slot]
        if served is None:
            return  # preempted for another's sake
        node = served.request.node
        covered = self._memories[node].grow(served.request.id, wanted)
        self._covered[slot] = covered
        if covered < wanted:
            self._stall(node, served, now_s)
        else:
            served.stalled_since_s = -1.0

    def _stall(self, node: int, served: Served, now_s: float) -> None:
        """Room is lacking: at once, or with lending after a while, the latest has to go."""
        if served.stalled_since_s < 0:
            served.stalled_since_s = now_s
        patience_s = self._setup.patience_s if self._setup.lending else 0.0
        if now_s - served.stalled_since_s < patience_s:
            return
        inside = [*self._running[node].values(), *self._filling[node].values()]
        latest = max(inside, key=lambda each: each.request.id)
        self.tally.preempted += 1
        self._again(node, latest, now_s)
        served.stalled_since_s = -1.0

    def _again(self, node: int, served: Served, now_s: float) -> None:
        """Its KV here is gone; it comes back to the queue's front once it is prefilled.

        What was still being brought in is not lost: where it comes from keeps it until then.
        """
        whole = served.request.id in self._running[node]
        self._leave(node, served)
        served.preempted += 1
        served.covered = 0
        self._coming += 1
        prefill_s = served.filled / self._engine.prefill_tokens_per_s if whole else 0.0

        def back(served: Served) -> None:
            self._coming -= 1
            self.queues[node].appendleft(served)

        self._later(prefill_s, back, served)

    def _finish(self, slot: int, now_s: float) -> None:
        served = self._slots[slot]
        assert served is not None
        self._leave(served.request.node, served)
        tally, request = self.tally, served.request
        tally.finished += 1
        if now_s > self._setup.warm_s:
            tally.served_tokens += request.tokens
        tally.by_kind[request.kind] = tally.by_kind.get(request.kind, 0) + 1
        tally.longest = max(tally.longest, request.tokens)

    def _leave(self, node: int, served: Served) -> None:
        number = served.request.id
        self._filling[node].pop(number, None)
        if self._running[node].pop(number, None) is not None:
            slot = served.slot
            served.produced = int(self._tokens[slot]) - served.request.prompt
            self._goal[slot] = 0
            self._slots[slot] = None
            self._free_slots.append(slot)
        self._memories[node].close(number)

    # Inside

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._setup.block_tokens)

    def _make_slots(self, more: int) -> None:
        first = len(self._slots)
        self._slots += [None] * more
        self._free_slots += range(first + more - 1, first - 1, -1)
        for name in ("_node", "_tokens", "_covered", "_goal"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros(more, np.int64)]))
