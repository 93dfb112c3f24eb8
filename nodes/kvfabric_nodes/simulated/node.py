"""A node for the simulator: the cores of a real one under simulated shells.

Calls, heartbeats, pulls and clocks are simulated; who may write, what is lent, fetched,
claimed and dropped is decided by the same code as in production.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

from google.protobuf.message import Message

from kvfabric.directory import Inventory
from kvfabric.errors import FabricError
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.simulation.engine import Event, Promise, Task
from kvfabric.simulation.nodes import MANAGER, Ground, Shape, Written
from kvfabric.types import PROTOCOL_VERSION, Key, NamespaceId, Status
from kvfabric_nodes.copying.pulls import Pulled, PullLimits, PullOrder, Pulls
from kvfabric_nodes.lending.core import Lending
from kvfabric_nodes.lending.instructions import (
    CALLS,
    AskCreditors,
    AskPlaces,
    AskReplicas,
    CallPeer,
    CancelFetch,
    Fetch,
    Instruction,
)
from kvfabric_nodes.lending.terms import Identity, Terms
from kvfabric_nodes.metrics import NodeMetrics
from kvfabric_nodes.orders.commands import Commands, Told
from kvfabric_nodes.orders.drops import Question
from kvfabric_nodes.reporting.reports import Reports
from kvfabric_nodes.sequences.core import Sequences
from kvfabric_nodes.simulated.memory import SimulatedMemory
from kvfabric_nodes.simulated.pulls import Header, SimulatedPuller, Sources, Tags
from kvfabric_nodes.store.arena import Arena
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extents
from kvfabric_nodes.store.shards import Shard

CONFIRM_S = 2.0  # as in confirming.py
POKE_GAP_S = 0.02  # as in heartbeat.py
RETRY_S = 0.5
MIN_WAIT_S = 0.005  # clocks drift: a timer may be a little early
TIMER_S = 1.0  # ticks come sooner than this


class SimulatedNode:
    """See the module, and kvfabric.simulation.nodes.Node."""

    def __init__(self, name: str, shape: Shape, ground: Ground) -> None:
        self.name = name
        self.shape = shape
        self.incarnation = ground.unique()
        self.core = NodeCore(Extents(shape.segments, shape.segment_bytes))
        self.tags = Tags()
        self.sequences = Sequences(self.core, first_id=self.incarnation << 32)
        self._ground = ground
        self._simulation, self._network = ground.simulation, ground.network
        self._endpoints = ground.endpoints(name)
        cap = int(shape.capacity_bytes * shape.cap_share) if shape.lending else 0
        self.me = Identity(name, self.incarnation, self._endpoints)
        terms = Terms(cap, loan_s=shape.loan_s, recall_s=shape.recall_s)
        self.lending = Lending(self.core, self.me, terms, self.sequences.victims)
        self.pulls = Pulls(PullLimits(parallel=4))
        self.sources = Sources(self.core, self.tags)
        self.puller = SimulatedPuller(
            name, self.core, self.tags, self.pulls, ground, self._sources_of, self._poke
        )
        self.memory = SimulatedMemory(
            shape, ground, name, self.core, self.sequences, self.lending, self.tags
        )
        self.memory.sought = self.carry_out
        self.memory.asked = lambda size_bytes: self._begin(self._ask_what_is_left(size_bytes))
        self._metrics = _Metrics(name, self.incarnation, self.core)
        self._metrics.lend_cap_bytes = cap
        self._reports = Reports(self.core, self._metrics, name)
        self._reports.loans = self.lending.loans
        self._reports.sequences = self.sequences.columns
        self._reports.steps = self.memory.take_steps
        self._reports.rates = self.puller.take_rates
        self._commands = self._obedience()
        self._epoch = 0
        self._connected = False
        self._poked = False
        self._wake: Promise[None] | None = None  # of a pause between two heartbeats
        self._may_wake = False
        self._tasks: dict[Task, None] = {}
        self._timer: Event | None = None  # for what lending has to do before the next tick
        self._stopped = False
        self.core.on_dropped.append(self._dropped)

    # Life -----------------------------------------------------------------------------

    def start(self) -> None:
        self._begin(self._report())

    def stop(self) -> None:
        self._stopped = True
        self.puller.stop()
        for task in self._tasks:
            task.kill()

    def tick(self) -> None:
        now_s = self._now()
        self.core.tick(now_s)
        self.sequences.tick(now_s)
        self.lending.tick(now_s)
        self._commands.tick(now_s)
        self.carry_out()
        self._renew_memory()

    # Calls of others --------------------------------------------------------------------

    def handle(self, caller: str, name: str, request: Any) -> Any:
        """Answers one call; None: as a node that is gone."""
        if self._stopped:
            return None
        now_s = self._now()
        self.core.tick(now_s)
        if name == "read":
            return self.sources.describe(caller, request[0], request[1], now_s)
        if name == "release":
            self.sources.release(caller, request)
            return True
        method = getattr(self.lending, name)
        response = method(_copied(request), now_s)
        if name == "lend":
            self._ground.reach("lend.reserved", self.name, caller)
        elif name == "recall_loan":
            self._ground.reach("recall.heard", self.name, caller)
        self.carry_out()
        return _copied(response)

    # The engine's memory: see SimulatedMemory ---------------------------------------------

    def room(self, blocks: int, owed: int) -> bool:
        return self.memory.room(blocks, owed)

    def open(self, request: int, tokens: int) -> bool:
        return self.memory.open(request, tokens)

    def grow(self, request: int, tokens: int) -> int:
        return self.memory.grow(request, tokens)

    def close(self, request: int, *, drop: bool = True) -> None:
        self.memory.close(request, drop=drop)
        self.carry_out()

    def lent(self) -> Mapping[int, int]:
        return self.memory.lent()

    def stepped(self, batch: int, tokens: int, seconds: float, steps: float, waiting: int) -> None:
        self.memory.stepped(batch, tokens, seconds, steps, waiting)

    # Questions ----------------------------------------------------------------------------

    def sealed(self, request: int) -> list[Written]:
        return self.memory.sealed(request)

    def inventory(self) -> Inventory:
        return Inventory(self.core.shards.count, self.core.inventory_hash)

    def holds(self, namespace: NamespaceId, key: Key) -> bool:
        return self.core.shards.get(namespace, key) is not None

    def payload(self, namespace: NamespaceId, key: Key) -> bytes | None:
        shard = self.core.shards.get(namespace, key)
        return None if shard is None else self.tags.read(shard.extent)

    def whereabouts(self, namespace: NamespaceId, key: Key) -> str | None:
        return self.lending.whereabouts(namespace, key)

    def used_bytes(self) -> int:
        return self.shape.capacity_bytes - self.core.free_bytes

    def cached_bytes(self) -> int:
        return self.core.shards.size_bytes - self.core.shards.claimed_bytes

    def lent_bytes(self) -> int:
        return self.lending.lent_bytes

    def borrowed_bytes(self) -> int:
        return self.lending.borrowed_bytes

    def copied_bytes(self) -> int:
        return self.puller.copied_bytes

    def leftovers(self) -> Iterable[str]:
        books = self.core.books()
        for what, count in (
            ("sequences", len(self.sequences.all)),
            ("pulls", len(self.pulls)),
            ("reserved bytes", books.reserved_bytes),
            ("quarantined bytes", books.quarantined_bytes),
            ("lent bytes", self.lending.lent_bytes),
            ("borrowed bytes", self.lending.borrowed_bytes),
            ("claimed bytes", self.core.shards.claimed_bytes),
        ):
            if count:
                yield f"{self.name}: {count} {what}"

    def check(self) -> None:
        self.core.check()
        self.sequences.check()
        self.lending.check()
        self.pulls.check()
        self._commands.drops.check()

    # Instructions -------------------------------------------------------------------------

    def carry_out(self) -> None:
        """What lending wants now."""
        while instructions := self.lending.take():
            for instruction in instructions:
                self._carry_out(instruction)
        if self._timer is not None:
            self._timer.cancel()
        wait_s = max(MIN_WAIT_S, self.lending.due_s() - self._now())
        soon = wait_s < TIMER_S
        self._timer = self._simulation.after(wait_s, self._on_timer) if soon else None

    def _on_timer(self) -> None:
        self._timer = None
        if not self._stopped:
            self.lending.tick(self._now())
            self.carry_out()

    def _carry_out(self, wanted: Instruction) -> None:
        if isinstance(wanted, Fetch):
            self._fetch(wanted.order)
        elif isinstance(wanted, CancelFetch):
            self.puller.cancel("loan", wanted.order_id)
        elif isinstance(wanted, CallPeer):
            self._begin(self._call(wanted))
        elif isinstance(wanted, AskCreditors):
            self._begin(self._ask_creditors(wanted))
        elif isinstance(wanted, AskPlaces):
            self._begin(self._ask_places(wanted))
        elif isinstance(wanted, AskReplicas):
            self._begin(self._ask_replicas(wanted))

    def _fetch(self, order: PullOrder) -> None:
        try:
            self.puller.begin(order, self._fetched)
        except FabricError as error:
            self._simulation.after(0.0, self._fetched, Pulled.not_begun(order, str(error)))

    def _fetched(self, result: Pulled) -> None:
        if self._stopped:
            return
        self._ground.reach("lend.sealed", self.name, result.order.source)
        self.lending.fetched(result, self._now())
        self.carry_out()

    async def _call(self, wanted: CallPeer) -> None:
        name = CALLS[wanted.name]
        if name == "recall_loan":
            self._ground.reach("recall.asked", self.name, wanted.node)
        response = await self._network.call(
            self.name, wanted.node, name, wanted.request, self.shape.call_timeout_s
        )
        if name == "lend" and response is not None:
            self._ground.reach("borrow.reserved", self.name, wanted.node)
        why = "" if response is not None else f"{wanted.node} does not answer"
        self.lending.answered(wanted.ticket, response, self._now(), why)
        self.carry_out()

    async def _ask_what_is_left(self, size_bytes: int) -> None:
        """As an engine's scheduler would, before it admits what does not fit here."""
        await self._ask_borrow(size_bytes, ())

    async def _ask_borrow(
        self, size_bytes: int, exclude: Sequence[str]
    ) -> control_pb2.BorrowResponse | None:
        request = control_pb2.BorrowRequest(
            node=self.name, incarnation=self.incarnation, size_bytes=size_bytes, exclude=exclude
        )
        answer: control_pb2.BorrowResponse | None = await self._ask("Borrow", request)
        if answer is not None and not exclude:
            self.memory.heard_of(sum(answer.free_bytes))
        return answer

    async def _ask_creditors(self, wanted: AskCreditors) -> None:
        answer = await self._ask_borrow(wanted.size_bytes, wanted.exclude)
        self._ground.reach("borrow.asked", self.name, MANAGER)
        why = "" if answer is not None else "the manager does not answer"
        self.lending.creditors(wanted.ticket, answer, self._now(), why)
        self.carry_out()

    async def _ask_places(self, wanted: AskPlaces) -> None:
        nodes = await self._locate(wanted)
        if nodes is not None and any(nodes):
            self._ground.reach("borrow.seen", self.name, MANAGER)
        why = "" if nodes is not None else "the manager does not answer"
        self.lending.placed(wanted.ticket, nodes, self._now(), why)
        self.carry_out()

    async def _ask_replicas(self, wanted: AskReplicas) -> None:
        places = await self._locate(wanted)
        found = None
        if places is not None:
            found = [{name: self._ground.endpoints(name) for name in place} for place in places]
        why = "" if found is not None else "the manager does not answer"
        self.lending.replicas(wanted.ticket, found, self._now(), why)
        self.carry_out()

    async def _locate(self, wanted: AskPlaces | AskReplicas) -> list[tuple[str, ...]] | None:
        request = control_pb2.LocateRequest(
            namespace_id=wanted.namespace, keys=wanted.keys, node=self.name
        )
        answer = await self._ask("Locate", request)
        if answer is None:
            return None
        names = [tuple(place.nodes) for place in answer.places]
        return [names[index] if index < len(names) else () for index in answer.place]

    async def _ask(self, name: str, request: Any) -> Any:
        if not self._connected:
            return None
        answer = await self._network.call(
            self.name, MANAGER, name, request, self.shape.call_timeout_s
        )
        if answer is None:
            self._connected = False  # not asked again before it answers a heartbeat
        return answer

    def _ask_holder(self, question: Question, told: Told) -> None:
        """Whether another node has what is to be dropped here."""
        self._begin(self._confirm(question, told))

    async def _confirm(self, question: Question, told: Told) -> None:
        asked = (question.namespace, question.keys)
        header: Header | None = await self._network.call(
            self.name, question.node, "read", asked, CONFIRM_S
        )
        said = zip(question.keys, header.keys, strict=True) if header is not None else ()
        held = [key for key, each in said if each.status is Status.OK]
        told(question, [key for key in held if key not in question.pinned], {})
        if header is not None and header.lease:
            self._network.call(self.name, question.node, "release", header.lease, CONFIRM_S)

    # Heartbeats ------------------------------------------------------------------------------

    def _poke(self) -> None:
        """There is something that the manager should hear of soon."""
        self._poked = True
        if self._wake is not None and self._may_wake:
            self._wake.keep(None)

    async def _report(self) -> None:
        await self._simulation.sleep(self._simulation.random.random() * self.shape.heartbeat_s)
        while True:
            if await self._register():
                await self._pulse()
            self._connected = False
            await self._simulation.sleep(RETRY_S)

    async def _register(self) -> bool:
        request = control_pb2.RegisterRequest(
            min_version=PROTOCOL_VERSION,
            max_version=PROTOCOL_VERSION,
            node=self.name,
            incarnation=self.incarnation,
            endpoints=self._endpoints,
            tiers=self._metrics.stats().tiers,
            labels=self._ground.labels(self.name),
            epoch=self._epoch,
        )
        answer = await self._call_manager("Register", request)
        if answer is None:
            return False
        if answer.known_incarnation:
            self._rise(answer.known_incarnation + 1)
            return False
        self._epoch = max(self._epoch, answer.epoch)
        self._commands.registered()
        return True

    def _rise(self, incarnation: int) -> None:
        self.incarnation = self.me.incarnation = self._metrics.incarnation = incarnation

    async def _pulse(self) -> None:
        """Heartbeats on one stream until it breaks or the manager forgets us."""
        stream, sequence, full = self._ground.unique(), 0, True
        regular_s = float("-inf")
        while True:
            want_full = False
            regular = full or self._simulation.now_s >= regular_s + self.shape.heartbeat_s
            if regular:
                regular_s = self._simulation.now_s
            self._poked = False
            for message in self._reports.messages(full=full, regular=regular):
                sequence += 1
                message.sequence = sequence
                raw = message.SerializeToString()
                answer = await self._call_manager("Heartbeat", (stream, raw))
                if answer is None or answer.want_register:
                    return
                want_full = answer.want_full
                self._hear(answer)
            was_full, full = full, want_full
            self._connected = True
            if was_full or not full:
                await self._pause(regular_s, may_be_poked=not full)

    async def _pause(self, regular_s: float, *, may_be_poked: bool) -> None:
        """Until the next heartbeat is due, or somebody pokes."""
        due_s = regular_s + self.shape.heartbeat_s
        await self._simulation.sleep(min(POKE_GAP_S, self.shape.heartbeat_s))
        left_s = due_s - self._simulation.now_s
        if left_s <= 0 or (may_be_poked and self._poked):
            return
        self._wake = self._simulation.sleep(left_s)
        self._may_wake = may_be_poked
        await self._wake

    async def _call_manager(self, name: str, request: Any) -> Any:
        return await self._network.call(
            self.name, MANAGER, name, request, self.shape.call_timeout_s
        )

    def _hear(self, answer: control_pb2.HeartbeatResponse) -> None:
        if answer.epoch < self._epoch:
            return  # of a manager that was replaced
        self._epoch = answer.epoch
        self.core.draining = answer.draining
        if answer.commands:
            for command in answer.commands:
                self._ground.reach(f"command.{command.WhichOneof('what')}", self.name, MANAGER)
            self._commands.obey(answer.commands, answer.epoch)
            self.carry_out()

    # Inside -------------------------------------------------------------------------------------

    def _now(self) -> float:
        return self._ground.clock(self.name)

    def _begin(self, work: Any) -> None:
        if self._stopped:
            work.close()
            return
        if len(self._tasks) > 64:
            self._tasks = {task: None for task in self._tasks if not task.done}
        self._tasks[self._simulation.start(work)] = None

    def _dropped(self, shard: Shard, what: str, now_s: float) -> None:
        self._ground.reach(f"dropped.{what}", self.name)

    def _renew_memory(self) -> None:
        self.core.recycled.clear()

    def _sources_of(self, node: str) -> Sources | None:
        other = self._ground.node(node)
        return None if other is None else cast("SimulatedNode", other).sources

    def _obedience(self) -> Commands:
        """The real commands' shell; it needs of a handler what this node has, too."""
        clock = SimpleNamespace(now=self._now)
        handler = SimpleNamespace(core=self.core, clock=clock, metrics=self._metrics)
        commands = Commands(cast("Any", handler), cast("Any", self.puller), self._ask_holder)
        commands.lend = self.lending.command
        commands.on_dropped.append(self._poke)
        return commands


class _Metrics(NodeMetrics):
    """A node's own figures, without the many counters that nobody looks at here."""

    def __init__(self, node: str, incarnation: int, core: NodeCore) -> None:
        arena = cast("Arena", SimpleNamespace(ready_bytes=0))
        super().__init__(node, incarnation, core, arena)

    def stats(self) -> types_pb2.NodeStats:
        return types_pb2.NodeStats(
            node=self._node,
            incarnation=self.incarnation,
            tiers=[self._tier()],
            lend_cap_bytes=self.lend_cap_bytes,
        )


def _copied(message: Any) -> Any:
    """As the wire would: nobody shares a message's memory."""
    assert isinstance(message, Message)
    return type(message).FromString(message.SerializeToString())
