"""The gManager of the simulator: the real core, asked as ControlService would ask it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvfabric.errors import FabricError, Retry
from kvfabric.lending import planner
from kvfabric.manager import messages
from kvfabric.manager.core import ManagerCore
from kvfabric.manager.epoch import FencedStore, next_epoch, outrank
from kvfabric.manager.rules_store import RulesStore
from kvfabric.moves.migrating import Wish
from kvfabric.moves.policies import Drain
from kvfabric.rpc.v1 import control_pb2
from kvfabric.simulation.disk import SimulatedStore
from kvfabric.types import DIGEST_BYTES, PROTOCOL_VERSION, NodeId

Stopwatch = Callable[[], float]
"""Seconds of the machine that runs the simulation; nothing in it depends on them."""


@dataclass(slots=True)
class Line:
    """Least squares of y = base + slope * x, as sums."""

    count: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.count += 1
        self.x += x
        self.y += y
        self.xx += x * x
        self.xy += x * y

    @property
    def slope(self) -> float:
        spread = self.count * self.xx - self.x * self.x
        return (self.count * self.xy - self.x * self.y) / spread if spread else 0.0

    @property
    def base(self) -> float:
        return (self.y - self.slope * self.x) / self.count if self.count else 0.0


@dataclass(slots=True)
class Costs:
    """What the manager's work takes on the machine that runs the simulation."""

    plans_s: list[float] = field(default_factory=list)
    decisions: int = 0
    heartbeats: Line = field(default_factory=Line)  # seconds by shards told, parsing included
    locates: int = 0
    locate_s: float = 0.0


class SimulatedManager:
    """See the module. One life of a manager."""

    def __init__(
        self,
        silence_s: float,
        heartbeat_s: float,
        store: SimulatedStore,
        clock: Callable[[], float],
        stopwatch: Stopwatch,
        costs: Costs,
        *,
        plans: bool,
    ) -> None:
        self.epoch = next_epoch(store)
        self.core = ManagerCore(silence_s, clock())
        self._store = FencedStore(store, self.epoch)
        self._rules = RulesStore(self._store)
        self._rules.load(self.core.moving.rules)
        self.costs = costs
        self._silence_s = silence_s
        self._heartbeat_s = heartbeat_s
        self._clock = clock
        self._stopwatch = stopwatch
        self._plans = plans
        self._calls: dict[str, Callable[[Any], Any]] = {
            "Register": self._register,
            "Heartbeat": self._heartbeat,
            "Locate": self._locate,
            "Borrow": self._borrow,
        }

    def handle(self, caller: str, name: str, request: Any) -> Any:
        """Answers one call; None where it is refused, which ends a heartbeat's stream."""
        try:
            return self._calls[name](request)
        except FabricError:
            return None

    def tick(self) -> None:
        """Time has passed."""
        now_s = self._clock()
        self.core.tick(now_s)
        self._keep_drains()
        planning = self.core.planning
        if not self._plans or not planning.due(now_s):
            return
        begun_s = self._stopwatch()
        demand = planning.demand(now_s)
        if demand is not None:
            found = planner.plan(demand.instances, demand.contexts, demand.rates, planning.rules)
            self.costs.decisions += len(planning.adopt(found, now_s))
            self.costs.plans_s.append(self._stopwatch() - begun_s)

    # What operators ask for

    def drain(self, node: NodeId) -> None:
        """Retry while the store is away."""
        known = self.core.cluster.members.known_incarnation(node)
        if known:
            drain = Drain(known)
            self._rules.drain(node, drain)
            self.core.moving.draining.begin(node, drain, self._clock())

    def serve(self, node: NodeId) -> None:
        """Calls a drain off. Retry while the store is away."""
        self._rules.end_drain(node)
        self.core.moving.draining.cancel(node, self._clock())

    def migrate(self, node: NodeId) -> None:
        """Moves all that the node holds to where placement finds best."""
        self.core.moving.migrating.begin(Wish(None, (), node, None), self._clock())

    # Inside

    def _keep_drains(self) -> None:
        """Writes down what became of the drains of nodes that were started anew."""
        draining = self.core.moving.draining
        try:
            for node in list(draining.changed):
                drain = self.core.moving.rules.drains.get(node)
                if drain is None:
                    self._rules.end_drain(node)
                else:
                    self._rules.drain(node, drain)
                draining.changed.remove(node)
        except Retry:
            return  # at a later tick

    def _register(self, request: control_pb2.RegisterRequest) -> control_pb2.RegisterResponse:
        if request.epoch > self.epoch:
            self.epoch = self._store.epoch = outrank(self._store, self.epoch, request.epoch)
        answer = self.core.register(messages.register(request), self._clock())
        return control_pb2.RegisterResponse(
            version=PROTOCOL_VERSION,
            epoch=self.epoch,
            heartbeat_ms=int(self._heartbeat_s * 1000),
            silence_ms=int(self._silence_s * 1000),
            known_incarnation=answer.known_incarnation,
        )

    def _heartbeat(self, told: tuple[int, bytes]) -> control_pb2.HeartbeatResponse:
        stream, raw = told
        begun_s = self._stopwatch()
        request = control_pb2.HeartbeatRequest.FromString(raw)
        event = messages.heartbeat(request, stream)
        answer = self.core.heartbeat(event, self._clock())
        spent_s = self._stopwatch() - begun_s
        keys_bytes = sum(len(delta.keys) for delta in (*event.added, *event.removed))
        self.costs.heartbeats.add(keys_bytes // DIGEST_BYTES, spent_s)
        return messages.answer(answer, self.epoch)

    def _locate(self, request: control_pb2.LocateRequest) -> control_pb2.LocateResponse:
        namespace = messages.namespace_id(request.namespace_id)
        keys = messages.keys(request.keys)
        begun_s = self._stopwatch()
        found = self.core.locate(namespace, keys, prefix=request.prefix)
        self.costs.locates += 1
        self.costs.locate_s += self._stopwatch() - begun_s
        return control_pb2.LocateResponse(
            place=found.indices, places=messages.places(found.places), epoch=self.epoch
        )

    def _borrow(self, request: control_pb2.BorrowRequest) -> control_pb2.BorrowResponse:
        found = self.core.lending.borrow(
            messages.node_id(request.node),
            request.incarnation,
            request.size_bytes,
            {NodeId(each) for each in request.exclude},
            self._clock(),
        )
        return control_pb2.BorrowResponse(
            nodes=[member.node for member in found.creditors],
            endpoints=[member.endpoints for member in found.creditors],
            free_bytes=found.free_bytes,
            reason=found.reason,
        )
