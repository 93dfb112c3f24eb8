"""A simulated cluster: nodes, their manager, the network between them, and everybody's clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from kvfabric.rpc.v1 import types_pb2
from kvfabric.simulation.control import Costs, SimulatedManager, Stopwatch
from kvfabric.simulation.disk import SimulatedStore
from kvfabric.simulation.engine import Simulation
from kvfabric.simulation.network import Links, Network, Place
from kvfabric.simulation.nodes import MANAGER, Factory, Node, Shape

TICK_S = 0.1
MANAGER_TICK_S = 0.25
RACK_LABEL = "rack"
ZONE_LABEL = "zone"

Reached = Callable[[str, str, str], None]
"""A point, the node that reached it, and the other one that it has to do with."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a cluster is laid out."""

    nodes: int
    shape: Shape
    links: Links
    silence_s: float = 5.0
    nodes_per_host: int = 8
    hosts_per_rack: int = 4
    tick_s: float = TICK_S


@dataclass(slots=True)
class Skew:
    """A clock that is not the others': it began elsewhere, and goes faster or slower."""

    offset_s: float = 0.0
    rate: float = 1.0


class World:
    """See the module. It is what simulated nodes stand on (`nodes.Ground`)."""

    def __init__(
        self,
        plan: Plan,
        seed: int,
        make: Factory,
        stopwatch: Stopwatch = lambda: 0.0,
        reached: Reached | None = None,
    ) -> None:
        self.plan = plan
        self.simulation = Simulation(seed)
        self.network = Network(self.simulation, plan.links)
        self.costs = Costs()
        self.store = SimulatedStore()
        self.skews: dict[str, Skew] = {}
        self.names = [f"n{number:04d}" for number in range(plan.nodes)]
        self.nodes: dict[str, Node] = {}
        self.manager: SimulatedManager | None = None
        self.reached = reached
        self._make = make
        self._stopwatch = stopwatch
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._unique = itertools.count(1)
        self.start_manager()
        for name in self.names:
            self.start_node(name)
        for number, name in enumerate(self.names):
            phase_s = plan.tick_s * number / plan.nodes
            self.simulation.every(plan.tick_s, self._ticker(name), phase_s)
        self.simulation.every(MANAGER_TICK_S, self._tick_manager)

    # Life and death ---------------------------------------------------------------------

    def start_node(self, name: str) -> Node:
        """A fresh, empty life of a node."""
        node = self.nodes[name] = self._make(name, self.plan.shape, self)
        place = Place(self._host(name), self._rack(name))
        self.network.join(name, place, node.handle)
        self.simulation.note(f"start {name}/{node.incarnation}")
        node.start()
        return node

    def stop_node(self, name: str) -> None:
        """As by kill -9 of everything on it."""
        node = self.nodes.pop(name, None)
        if node is not None:
            self.simulation.note(f"stop {name}")
            self.network.leave(name)
            node.stop()

    def start_manager(self) -> None:
        """One that knows nothing but the rules, with a greater epoch than all before it.

        While the store is away there is none.
        """
        if self.store.away:
            return
        shape = self.plan.shape
        self.manager = SimulatedManager(
            self.plan.silence_s,
            shape.heartbeat_s,
            self.store,
            lambda: self.clock(MANAGER),
            self._stopwatch,
            self.costs,
            plans=shape.lending,
        )
        self.network.join(MANAGER, Place("manager", "manager"), self.manager.handle)
        self.simulation.note("start manager")

    def stop_manager(self) -> None:
        if self.manager is not None:
            self.simulation.note("stop manager")
            self.network.leave(MANAGER)
            self.manager = None

    # Ground -----------------------------------------------------------------------------

    def clock(self, node: str) -> float:
        skew = self.skews.get(node)
        now_s = self.simulation.now_s
        return now_s if skew is None else skew.offset_s + now_s * skew.rate

    def reach(self, point: str, node: str, other: str = "") -> None:
        if self.reached is not None:
            self.reached(point, node, other)

    def number(self, node: str) -> int:
        return self._numbers[node]

    def unique(self) -> int:
        return next(self._unique)

    def endpoints(self, node: str) -> types_pb2.Endpoints:
        return types_pb2.Endpoints(host=self._host(node), tcp_address=f"{node}:1")

    def labels(self, node: str) -> dict[str, str]:
        rack = self._rack(node)
        return {RACK_LABEL: rack, ZONE_LABEL: f"zone of {rack}"}

    def node(self, name: str) -> Node | None:
        return self.nodes.get(name)

    # Questions --------------------------------------------------------------------------

    def check(self) -> None:
        """Asserts every core's invariants."""
        for node in self.nodes.values():
            node.check()
        if self.manager is not None:
            self.manager.core.check()

    def drift(self, name: str, offset_s: float, rate: float) -> None:
        """From now on the clock of `name` goes at this rate, without a step back."""
        now_s = self.clock(name)
        self.skews[name] = Skew(now_s + offset_s - self.simulation.now_s * rate, rate)

    # Inside -----------------------------------------------------------------------------

    def _ticker(self, name: str) -> Callable[[], None]:
        def tick() -> None:
            node = self.nodes.get(name)
            if node is not None:
                node.tick()

        return tick

    def _tick_manager(self) -> None:
        if self.manager is not None:
            self.manager.tick()

    def _host(self, name: str) -> str:
        return f"host{self._numbers[name] // self.plan.nodes_per_host}"

    def _rack(self, name: str) -> str:
        per_rack = self.plan.nodes_per_host * self.plan.hosts_per_rack
        return f"rack{self._numbers[name] // per_rack}"
