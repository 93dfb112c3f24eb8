"""Which shards are fetched from which node next: orders, their batches, rates and retries.

Pure: a shell calls it with the time, carries out the batches that it starts, each in a
thread of its own, and tells what became of their keys. An order has one batch under way
at a time, so that its rate needs no lock.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from kvfabric.errors import Retry
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.store.promises import Reservation

MIB = 1 << 20
BATCH_KEYS = 64
BATCH_BYTES = 64 * MIB
BATCH_S = 4.0  # so much of a throttled order's time goes into one batch
BURST_S = 0.05  # what a throttled order may catch up with
MIN_BYTES_PER_S = MIB  # slower, a shard would outlast every lease


class Outcome(enum.Enum):
    """What became of one key of an order."""

    COPIED = "copied"  # sealed here now
    HELD = "held"  # was here already
    MISSING = "missing"  # the source has it no more
    DAMAGED = "damaged"  # came with other bytes than its checksums say; the source was told
    FULL = "full"  # no room here
    FAILED = "failed"  # the source did not give it, again and again
    CANCELLED = "cancelled"

    @property
    def here(self) -> bool:
        """Whether this node holds the shard now."""
        return self in (Outcome.COPIED, Outcome.HELD)


@dataclass(frozen=True, slots=True, eq=False)
class PullOrder:
    """Shards to be copied here from `source`.

    `origin` and `id` name it: the same order given again while it is at work counts once.
    `reservation` holds keys whose room was reserved beforehand. From the order until its
    result it belongs to the puller, which seals or aborts all of it; whoever gave it may
    cancel the order meanwhile, and must not free anything.
    """

    id: int
    namespace: NamespaceId
    keys: tuple[Key, ...]
    source: str
    endpoints: types_pb2.Endpoints  # the source's
    bytes_per_s: int = 0  # 0: unthrottled
    priority: int = control_pb2.PRIORITY_MOVE
    evict: bool = True  # colder cache may go for it
    loan: int | None = None
    reservation: Reservation | None = None
    origin: str = "loan"
    why: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Pulled:
    """The end of an order: an outcome for every key, in the order's order."""

    order: PullOrder
    outcomes: dict[Key, Outcome]
    size_bytes: int  # copied
    seconds: float
    why: str = ""  # of the last failure

    @classmethod
    def not_begun(cls, order: PullOrder, why: str) -> Self:
        """Of an order that was refused."""
        return cls(order, dict.fromkeys(order.keys, Outcome.FAILED), 0, 0.0, why)


class Throttle:
    """At most `bytes_per_s` in the long run, and a short burst. 0: no limit."""

    def __init__(self, bytes_per_s: int) -> None:
        self.bytes_per_s = max(bytes_per_s, MIN_BYTES_PER_S) if bytes_per_s else 0
        self._paid_until_s = float("-inf")

    @property
    def on(self) -> bool:
        """Whether there is a limit."""
        return self.bytes_per_s > 0

    def take(self, size_bytes: int, now_s: float) -> float:
        """Books these bytes; answers how many seconds from now they may move."""
        if not self.bytes_per_s:
            return 0.0
        begin_s = max(self._paid_until_s, now_s - BURST_S)
        self._paid_until_s = begin_s + size_bytes / self.bytes_per_s
        return max(0.0, begin_s - now_s)

    @property
    def batch_bytes(self) -> int:
        """What one batch may move, unless a single shard is larger."""
        if not self.bytes_per_s:
            return BATCH_BYTES
        return min(BATCH_BYTES, int(self.bytes_per_s * BATCH_S))


@dataclass(slots=True, eq=False)
class Batch:
    """Keys of one order that one transfer tries to bring; fewer if they are too large."""

    order: PullOrder
    keys: tuple[Key, ...]
    throttle: Throttle
    cancelled: bool = False  # the transfer looks at it between two frames


@dataclass(frozen=True, slots=True)
class PullLimits:
    """Every limit of the queue, by name."""

    parallel: int = 4  # batches at once
    throttled: int = 3  # of these: somebody who waits for room must not wait for a slow one
    unthrottled: int = 3  # of these: more would only get in each other's way
    per_source: int = 2  # of these: a source that does not answer must not keep them all
    orders: int = 1024
    keys: int = 262_144  # of all orders together
    attempts: int = 6  # without any progress
    retry_s: float = 0.1  # after the first failure, twice as long after each further one
    retry_most_s: float = 2.0


@dataclass(slots=True, eq=False)
class _Work:
    """One order at work."""

    order: PullOrder
    throttle: Throttle
    pending: deque[Key]
    begun_s: float
    outcomes: dict[Key, Outcome] = field(default_factory=dict)
    batch: Batch | None = None
    turn: int = 0  # of its last batch
    failures: int = 0  # since the last progress
    retry_at_s: float = float("-inf")
    size_bytes: int = 0
    cancelled: bool = False
    why: str = ""


class Pulls:
    """See the module. `ended` orders wait in `results` for the shell to fetch them."""

    def __init__(self, limits: PullLimits | None = None) -> None:
        self.limits = limits or PullLimits()
        self.results: list[Pulled] = []
        self._works: dict[tuple[str, int], _Work] = {}
        self._flying: set[tuple[NamespaceId, Key]] = set()
        self._running = {True: 0, False: 0}  # batches under way, throttled and not
        self._sources: Counter[str] = Counter()  # of these
        self._keys = 0  # of all works
        self._turns = 0

    def __len__(self) -> int:
        """Orders that have not ended."""
        return len(self._works)

    @property
    def running(self) -> int:
        """Batches under way."""
        return sum(self._running.values())

    def add(self, order: PullOrder, now_s: float) -> bool:
        """Takes an order in; False where it is at work already. Retry where too many are."""
        name = (order.origin, order.id)
        if name in self._works:
            return False
        keys = dict.fromkeys(order.keys)
        if len(self._works) >= self.limits.orders or self._keys + len(keys) > self.limits.keys:
            raise Retry(
                f"{len(self._works)} pulls of {self._keys} keys wait already; the limits are "
                f"{self.limits.orders} and {self.limits.keys}: come again later"
            )
        work = _Work(order, Throttle(order.bytes_per_s), deque(keys), now_s)
        self._works[name] = work
        self._keys += len(keys)
        self._end_if_done(work, now_s)
        return True

    def cancel(self, origin: str, order_id: int, now_s: float) -> bool:
        """Ends an order; what is under way ends soon. Whether there was one."""
        work = self._works.get((origin, order_id))
        if work is None:
            return False
        work.cancelled = True
        for key in work.pending:
            work.outcomes[key] = Outcome.CANCELLED
        work.pending.clear()
        if work.batch is not None:
            work.batch.cancelled = True
        self._end_if_done(work, now_s)
        return True

    def start(self, now_s: float) -> list[Batch]:
        """The batches that begin now: the most urgent orders first, equals in turn."""
        batches: list[Batch] = []
        if self.running >= self.limits.parallel:
            return batches
        for work in sorted(self._works.values(), key=lambda w: (w.order.priority, w.turn)):
            if self.running >= self.limits.parallel:
                break
            if work.batch is None and work.retry_at_s <= now_s and self._may_start(work):
                self._start(work, batches)
        return batches

    def due_s(self, now_s: float) -> float | None:
        """When an order that waits after a failure may go on; None: none waits.

        One that may go on already, but has no place, waits for the end of another's batch.
        """
        waiting = (w.retry_at_s for w in self._works.values() if w.batch is None and w.failures)
        return min((at_s for at_s in waiting if at_s > now_s), default=None)

    def ended(
        self,
        batch: Batch,
        verdicts: Mapping[Key, Outcome],
        size_bytes: int,
        why: str,
        now_s: float,
    ) -> None:
        """A batch is over. Keys without a verdict come again; `why`: what went wrong."""
        work = self._works[batch.order.origin, batch.order.id]
        assert work.batch is batch
        work.batch = None
        self._running[work.throttle.on] -= 1
        self._sources[batch.order.source] -= 1
        self._sources = +self._sources
        self._flying.difference_update((batch.order.namespace, key) for key in batch.keys)
        work.size_bytes += size_bytes
        work.outcomes.update(verdicts)
        left = [key for key in batch.keys if key not in verdicts]
        if why:
            work.why = why
        if verdicts or not why:
            work.failures = 0
        if why and left:
            work.failures += 1
            wait_s = self.limits.retry_s * 2 ** (work.failures - 1)
            work.retry_at_s = now_s + min(wait_s, self.limits.retry_most_s)
        if work.cancelled or work.failures >= self.limits.attempts:
            end = Outcome.CANCELLED if work.cancelled else Outcome.FAILED
            work.outcomes.update(dict.fromkeys([*left, *work.pending], end))
            work.pending.clear()
        else:
            work.pending.extendleft(reversed(left))
        self._end_if_done(work, now_s)

    def check(self) -> None:
        """Asserts all invariants."""
        batches = [work.batch for work in self._works.values() if work.batch is not None]
        assert self.running == len(batches) <= self.limits.parallel
        slow = sum(batch.throttle.on for batch in batches)
        assert self._running[True] == slow <= self.limits.throttled
        assert self._sources == Counter(batch.order.source for batch in batches)
        assert all(count <= self.limits.per_source for count in self._sources.values())
        assert self._running[False] == len(batches) - slow <= self.limits.unthrottled
        flying = [(batch.order.namespace, key) for batch in batches for key in batch.keys]
        assert len(flying) == len(self._flying)
        assert set(flying) == self._flying
        assert self._keys == sum(len(set(w.order.keys)) for w in self._works.values())
        assert self._keys <= self.limits.keys
        assert len(self._works) <= self.limits.orders
        for work in self._works.values():
            parts = [*work.pending, *work.outcomes, *(work.batch.keys if work.batch else ())]
            assert len(parts) == len(set(work.order.keys)), "a key is lost, or there twice"
            assert set(parts) == set(work.order.keys)
            assert work.batch or work.pending, "an order that is done has not ended"

    def _may_start(self, work: _Work) -> bool:
        limits, slow = self.limits, work.throttle.on
        most = limits.throttled if slow else limits.unthrottled
        return self._running[slow] < most and self._sources[work.order.source] < limits.per_source

    def _start(self, work: _Work, batches: list[Batch]) -> None:
        """Begins a batch, unless all its keys are under way for other orders."""
        namespace = work.order.namespace
        chosen: list[Key] = []
        later: list[Key] = []
        while work.pending and len(chosen) < BATCH_KEYS and len(later) < BATCH_KEYS:
            key = work.pending.popleft()
            (later if (namespace, key) in self._flying else chosen).append(key)
        if not chosen:
            work.pending.extendleft(reversed(later))
            return
        work.pending.extend(later)
        self._turns += 1
        work.turn = self._turns
        work.batch = Batch(work.order, tuple(chosen), work.throttle)
        self._flying.update((namespace, key) for key in chosen)
        self._running[work.throttle.on] += 1
        self._sources[work.order.source] += 1
        batches.append(work.batch)

    def _end_if_done(self, work: _Work, now_s: float) -> None:
        if work.pending or work.batch is not None:
            return
        order = work.order
        del self._works[order.origin, order.id]
        self._keys -= len(set(order.keys))
        outcomes = {key: work.outcomes[key] for key in order.keys}
        self.results.append(
            Pulled(order, outcomes, work.size_bytes, now_s - work.begun_s, work.why)
        )
