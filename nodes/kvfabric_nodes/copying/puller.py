"""Pulls as they happen: threads that carry out the batches that `Pulls` starts.

It runs on the core's loop. Whoever orders a pull is told of its end there, too.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from kvfabric.types import Key
from kvfabric_nodes.copying.landing import Landing, Result
from kvfabric_nodes.copying.peers import Peers
from kvfabric_nodes.copying.pulls import Batch, Outcome, Pulled, PullLimits, PullOrder, Pulls
from kvfabric_nodes.copying.transfer import OnCore, Transfer
from kvfabric_nodes.serving.handler import Handler

MEASURED_BYTES = 4 << 20  # a smaller transfer says little about a link's rate

Told = Callable[[Pulled], object]


class Puller:
    """See the module."""

    def __init__(
        self, handler: Handler, peers: Peers, on_core: OnCore, limits: PullLimits | None = None
    ) -> None:
        self.pulls = Pulls(limits)
        self.on_copied: list[Callable[[], object]] = []  # told when shards have been sealed
        self.rates: dict[str, int] = {}  # bytes per second by source, as measured last
        self._handler = handler
        self._clock = handler.clock
        self._tally = handler.metrics.pulls
        self._loop = asyncio.get_running_loop()
        self._stopping = threading.Event()
        self._landing = Landing(handler)
        self._transfer = Transfer(self._landing, peers, on_core, self._stopping)
        self._pool = ThreadPoolExecutor(self.pulls.limits.parallel, "kvfabric-pull")
        self._running: set[asyncio.Future[Result]] = set()
        self._told: dict[tuple[str, int], list[Told]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._pumping = False

    def begin(self, order: PullOrder, told: Told) -> None:
        """Takes an order in; `told` of its end, later. An order that is at work already
        gets one more to be told. Retry where too many wait."""
        self.pulls.add(order, self._clock.now())
        self._told.setdefault((order.origin, order.id), []).append(told)
        self._loop.call_soon(self._pump)

    async def pull(self, order: PullOrder) -> Pulled:
        """As `begin`; answers the end. Cancelled, it cancels the order."""
        end: asyncio.Future[Pulled] = self._loop.create_future()

        def told(result: Pulled) -> None:
            if not end.done():
                end.set_result(result)

        self.begin(order, told)
        try:
            return await end
        except asyncio.CancelledError:
            self.cancel(order.origin, order.id)
            raise

    def cancel(self, origin: str, order_id: int) -> None:
        """Ends an order soon, with what has come of it."""
        if self.pulls.cancel(origin, order_id, self._clock.now()):
            self._loop.call_soon(self._pump)

    async def close(self) -> None:
        """Ends what is under way and waits for it. The sessions with sources end before."""
        self._stopping.set()
        if self._timer is not None:
            self._timer.cancel()
        if self._running:
            await asyncio.wait(self._running)
        self._pool.shutdown()

    def take_rates(self) -> dict[str, int]:
        """The links measured since this was asked last."""
        taken, self.rates = self.rates, {}
        return taken

    def _pump(self) -> None:
        """Starts what may start, and tells of what has ended."""
        if self._stopping.is_set() or self._pumping:
            return
        self._pumping = True
        try:
            now_s = self._clock.now()
            while batches := self.pulls.start(now_s):
                for batch in batches:
                    self._start(batch)
                now_s = self._clock.now()
            self._tell()
        finally:
            self._pumping = False
        self._set_timer(now_s)

    def _start(self, batch: Batch) -> None:
        keys = self._landing.missing(batch)
        held = dict.fromkeys(set(batch.keys).difference(keys), Outcome.HELD)
        if not keys:
            self.pulls.ended(batch, held, 0, "", self._clock.now())
            return
        running = self._loop.run_in_executor(self._pool, self._transfer.run, batch, keys)
        self._running.add(running)
        running.add_done_callback(lambda done: self._ended(batch, held, done))

    def _ended(self, batch: Batch, held: dict[Key, Outcome], done: asyncio.Future[Result]) -> None:
        self._running.discard(done)
        result = done.result()
        self.pulls.ended(
            batch, held | result.verdicts, result.size_bytes, result.why, self._clock.now()
        )
        self._tally.moved.add(result.size_bytes, result.seconds)
        if result.size_bytes:
            if not batch.throttle.bytes_per_s and result.size_bytes >= MEASURED_BYTES:
                self.rates[batch.order.source] = int(result.size_bytes / result.seconds)
            for told in self.on_copied:
                told()
        self._pump()

    def _tell(self) -> None:
        results, self.pulls.results = self.pulls.results, []
        for result in results:
            order = result.order
            self._landing.end(order.reservation)
            for outcome, count in Counter(result.outcomes.values()).items():
                self._tally.outcomes[outcome.value] += count
            for told in self._told.pop((order.origin, order.id), []):
                self._loop.call_soon(told, result)

    def _set_timer(self, now_s: float) -> None:
        """`now_s`: when nothing more could be started."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_s = self.pulls.due_s(now_s)
        if due_s is not None:
            self._timer = self._loop.call_later(due_s - now_s, self._pump)
