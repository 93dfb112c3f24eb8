"""A few nodes that lend to each other, a manager that knows what they tell it, and a network
that loses, repeats and reorders what is sent. One seed decides everything."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from kvfabric.errors import FabricError
from kvfabric.lending.loans import Loan, LoanState, from_columns
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import Key, NamespaceId, Status
from kvfabric_nodes.copying.pulls import Outcome, Pulled, PullOrder
from kvfabric_nodes.lending.core import Lending
from kvfabric_nodes.lending.instructions import (
    CALLS,
    AskCreditors,
    AskPlaces,
    AskReplicas,
    CallPeer,
    CancelFetch,
    Fetch,
)
from kvfabric_nodes.lending.room import Room
from kvfabric_nodes.lending.terms import Identity, Terms
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extents, Pool
from kvfabric_nodes.store.promises import Limits
from kvfabric_nodes.store.shards import Shard

from .conftest import SEGMENT_BYTES, SEGMENTS, SHARD_BYTES, Desk

SLOTS = SEGMENTS * SEGMENT_BYTES // SHARD_BYTES
Spot = tuple[int, int, int]  # segment, offset, generation


@dataclass(slots=True)
class Weather:
    """How the network and the manager behave."""

    loss: float = 0.0  # of a message
    twice: float = 0.0  # it comes again, later
    delay_s: float = 0.01  # at most
    call_s: float = 2.0  # then a call has failed
    pull_s: float = 0.05  # at most, for a fetch
    heartbeat_s: float = 0.2
    manager: bool = True  # it answers
    cut: set[frozenset[str]] = field(default_factory=set)  # pairs that hear nothing of each other
    lost_message: int = 0  # this one is lost, counted from 1
    late_message: int = 0  # this one comes a second time, much later


class Node:
    """One life of a node: its core, its loans, and the blocks that it needs."""

    def __init__(self, town: Town, name: str, incarnation: int, terms: Terms) -> None:
        self.town = town
        self.name = name
        self.alive = True
        self.core = NodeCore(Extents(SEGMENTS, SEGMENT_BYTES), Limits(deadline_s=1000.0))
        self.me = Identity(name, incarnation, types_pb2.Endpoints(host=name))
        self.lending = Lending(self.core, self.me, terms, self.victims)
        self.desk = Desk(self.core)
        self.bytes: dict[Spot, Key] = {}  # what lies in an extent
        self.needed: dict[Key, None] = {}  # claimed, oldest first
        self.hoped: set[Key] = set()  # needed, too, but others had them: they may vanish
        self.rooms: list[Room] = []
        self.cancelled: set[int] = set()
        self.leases: list[int] = []
        self.core.on_dropped.append(self._dropped)

    @property
    def namespace(self) -> NamespaceId:
        return self.desk.namespace

    def victims(
        self,
        pool: Pool | None,
        size_bytes: int,
        skip: Callable[[Shard], bool] = lambda shard: False,
        sequence_id: int = 0,
    ) -> Sequence[Shard]:
        """As a sequence's: the oldest blocks first."""
        shards = [self.shard(key) for key in self.needed]
        fit = [shard for shard in shards if shard is not None and not skip(shard)]
        return fit[: -(-size_bytes // SHARD_BYTES)]

    def shard(self, key: Key) -> Shard | None:
        return self.core.shards.get(self.namespace, key)

    def put(self, key: Key, *, need: bool = True) -> bool:
        """One block, if there is room; as a sequence does, it needs it then."""
        self.desk.now_s = self.town.now_s
        reservation, _ = self.desk.reserve([key])
        if reservation is not None:
            self.write(reservation.items[0].extent, key)
            assert self.core.seal(reservation, 0, (1,), self.town.now_s).status is Status.OK
        if need and self.shard(key) is not None:
            self.need(key)
        return self.shard(key) is not None

    def need(self, key: Key) -> None:
        if key not in self.needed:
            self.needed[key] = None
            self.core.shards.claim(self.namespace, key)

    def begin(self, keys: Sequence[Key]) -> None:
        """A sequence begins with these blocks, wherever they are."""
        for key in keys:
            self.need(key)
        self.lending.claim(self.namespace, "a", 1, SHARD_BYTES, keys, self.town.now_s)
        self.carry_out()

    def forget(self, key: Key, *, drop: bool = False) -> None:
        """The block is needed no more."""
        del self.needed[key]
        self.hoped.discard(key)
        if drop:
            self.lending.discard(self.namespace, [key])
        self.core.end_of_claim(self.namespace, key, self.town.now_s)

    def make_room(self, count: int = 1, timeout_s: float = 20.0) -> Room:
        room = self.lending.make_room("a", SHARD_BYTES, count, timeout_s, self.town.now_s)
        self.rooms.append(room)
        self.carry_out()
        return room

    def grow(self, key: Key) -> bool:
        """A block more, for which room is sought where there is none."""
        if self.put(key):
            return True
        room = self.make_room()
        self.town.until(lambda: not room.waiting)
        return self.put(key)

    def write(self, extent: Any, key: Key) -> None:
        self.bytes[extent.segment, extent.offset, extent.generation] = key

    def read(self, key: Key) -> Key | None:
        """What is read here under this key."""
        shard = self.shard(key)
        if shard is None:
            return None
        extent = shard.extent
        return self.bytes[extent.segment, extent.offset, extent.generation]

    def loans(self) -> list[Loan]:
        return from_columns(self.lending.loans())

    def borrowed(self) -> list[Loan]:
        return [loan for loan in self.loans() if loan.debtor == self.name]

    def lent(self) -> list[Loan]:
        return [loan for loan in self.loans() if loan.creditor == self.name]

    def told(self, key: Key) -> list[str]:
        """The story of a key: what became of it."""
        return [d.what for d in self.core.story.tell(frozenset([self.namespace]), key)]

    # The shell ------------------------------------------------------------------------

    def tick(self) -> None:
        self.core.tick(self.town.now_s)
        self.lending.tick(self.town.now_s)
        self.carry_out()

    def carry_out(self) -> None:
        while instructions := self.lending.take():
            for wanted in instructions:
                if isinstance(wanted, CallPeer):
                    self._call(wanted)
                elif isinstance(wanted, Fetch):
                    self._fetch(wanted.order)
                elif isinstance(wanted, CancelFetch):
                    self.cancelled.add(wanted.order_id)
                else:
                    self._ask(wanted)

    def _event(self, method: Callable[..., None], *arguments: Any) -> Callable[[], None]:
        """Something that happens to this life of the node only."""

        def happen() -> None:
            if self.alive:
                method(*arguments, self.town.now_s)
                self.carry_out()

        return happen

    def _ask(self, wanted: AskCreditors | AskPlaces | AskReplicas) -> None:
        town = self.town
        if isinstance(wanted, AskCreditors):
            answer: Any = town.creditors(self.name, wanted) if town.weather.manager else None
            town.after(self._event(self.lending.creditors, wanted.ticket, answer))
            return
        nodes: Any = [town.seen(self.name, (wanted.namespace, key)) for key in wanted.keys]
        if not town.weather.manager:
            nodes = None
        if isinstance(wanted, AskPlaces):
            town.after(self._event(self.lending.placed, wanted.ticket, nodes))
            return
        found = nodes and [{name: types_pb2.Endpoints(host=name) for name in n} for n in nodes]
        town.after(self._event(self.lending.replicas, wanted.ticket, found))

    def _call(self, wanted: CallPeer) -> None:
        town = self.town
        request = type(wanted.request).FromString(wanted.request.SerializeToString())

        def arrive() -> None:
            peer = town.nodes[wanted.node]
            try:
                response = getattr(peer.lending, CALLS[wanted.name])(request, town.now_s)
            except FabricError as error:
                town.send(wanted.node, self.name, answered(None, str(error)))
            else:
                peer.carry_out()
                town.send(wanted.node, self.name, answered(response, ""))

        def answered(response: Any, why: str) -> Callable[[], None]:
            return self._event(
                lambda now_s: self.lending.answered(wanted.ticket, response, now_s, why)
            )

        town.send(self.name, wanted.node, arrive)
        town.after(answered(None, "no answer"), town.weather.call_s)

    def _fetch(self, order: PullOrder) -> None:
        source = self.town.nodes[order.source]
        begin_s = self.town.random.uniform(0, self.town.weather.pull_s)

        def begin() -> None:
            if not self.alive:
                return
            got = {}
            if source.alive and self.town.reach(self.name, source.name):
                got = {key: source.read(key) for key in order.keys}
            more_s = self.town.random.uniform(0, self.town.weather.pull_s)
            self.town.after(lambda: end(got), more_s)

        def end(got: dict[Key, Key | None]) -> None:
            if not self.alive:
                return
            whole = source.alive and self.town.reach(self.name, source.name)
            outcomes = self._fill(order, got if whole else {})
            self.lending.fetched(Pulled(order, outcomes, 0, 0.0, "as told"), self.town.now_s)
            self.carry_out()

        self.town.after(begin, begin_s)

    def _fill(self, order: PullOrder, got: dict[Key, Key | None]) -> dict[Key, Outcome]:
        outcomes = {}
        reservation = order.reservation
        assert reservation is not None
        for index, item in list(reservation.items.items()):
            payload = got.get(item.key)
            if order.id in self.cancelled or payload is None:
                self.core.abort(reservation, [index])
                outcomes[item.key] = Outcome.CANCELLED
                continue
            self.write(item.extent, payload)
            grant = self.core.seal(reservation, index, (1,), self.town.now_s)
            good = grant.status is Status.OK
            outcomes[item.key] = Outcome.COPIED if good else Outcome.FAILED
        return outcomes

    def _dropped(self, shard: Shard, what: str, now_s: float) -> None:
        """The last copy that is known to be good is never dropped for a loan's sake."""
        if what == "lent":
            creditor = self.lending.whereabouts(*_place(shard))
            assert creditor is not None
            assert (self.name, creditor, _place(shard)) in self.town.told

    def check(self) -> None:
        self.core.check()
        self.lending.check()
        for key in self.needed:
            assert self.core.shards.claims(self.namespace, key)
        for shard in self.core.shards:
            assert self.read(shard.key) == shard.key, "wrong bytes"


class Town:
    """The nodes, their network, their manager, and the time."""

    def __init__(
        self, names: Sequence[str], seed: int = 0, weather: Weather | None = None, **terms: Any
    ) -> None:
        self.random = Random(seed)
        self.weather = weather or Weather()
        self.now_s = 0.0
        self.happened = 0  # events so far
        self.sent = 0  # messages
        self.deaths: dict[int, str] = {}  # after so many events this node is started anew
        self.terms = Terms(**{"cap_bytes": SLOTS // 2 * SHARD_BYTES, "loan_s": 30.0, **terms})
        self.directory: dict[str, set[tuple[NamespaceId, Key]]] = {}
        self.free: dict[str, int] = {}
        self.told: set[tuple[str, str, tuple[NamespaceId, Key]]] = set()  # to whom, what
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count(1)
        self.nodes = {name: Node(self, name, 1, self.terms) for name in names}
        for name in names:
            self.report(name)
        self.after(self._heartbeats, self.weather.heartbeat_s)

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    # Time -----------------------------------------------------------------------------

    def after(self, event: Callable[[], None], delay_s: float = 0.0) -> None:
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._numbers), event))

    def run(self, seconds: float) -> None:
        """Lets time pass."""
        end_s = self.now_s + seconds
        while self._events[0][0] <= end_s:
            self.now_s, _, event = heapq.heappop(self._events)
            event()
            self.happened += 1
            if self.happened in self.deaths:
                self.restart(self.deaths[self.happened])
        self.now_s = end_s

    def until(self, true: Callable[[], bool], limit_s: float = 100.0) -> None:
        """Lets time pass until this is so."""
        end_s = self.now_s + limit_s
        while not true():
            assert self.now_s < end_s, "it never came to that"
            self.run(0.05)

    def _heartbeats(self) -> None:
        for node in self.nodes.values():
            node.tick()
            if self.weather.manager:
                self.report(node.name)
        self.after(self._heartbeats, self.weather.heartbeat_s)

    # The network ------------------------------------------------------------------------

    def reach(self, one: str, other: str) -> bool:
        return frozenset((one, other)) not in self.weather.cut

    def send(self, sender: str, receiver: str, arrive: Callable[[], None]) -> None:
        self.sent += 1
        again = self.random.random() < self.weather.twice or self.sent == self.weather.late_message
        for number in range(2 if again else 1):
            delay_s = self.random.uniform(0, self.weather.delay_s) * (1 + 100 * number)
            lost = (
                self.random.random() < self.weather.loss or self.sent == self.weather.lost_message
            )
            if not lost and self.reach(sender, receiver):
                self.after(arrive, delay_s)

    def restart(self, name: str) -> Node:
        """Kills a node's process; another one begins with nothing."""
        old = self.nodes[name]
        old.alive = False
        node = Node(self, name, old.me.incarnation + 1, self.terms)
        self.nodes[name] = node
        return node

    # The manager ------------------------------------------------------------------------

    def report(self, name: str) -> None:
        node = self.nodes[name]
        self.directory[name] = {_place(shard) for shard in node.core.shards}
        claimed = sum(s.extent.size_bytes for s in node.core.shards if node.core.shards.claimed(s))
        self.free[name] = SEGMENTS * SEGMENT_BYTES - claimed

    def seen(self, asker: str, place: tuple[NamespaceId, Key]) -> tuple[str, ...]:
        holders = tuple(name for name, held in self.directory.items() if place in held)
        if self.weather.manager:
            self.told.update((asker, name, place) for name in holders)
        return holders

    def creditors(self, asker: str, wanted: AskCreditors) -> control_pb2.BorrowResponse:
        ranked = sorted(self.nodes, key=lambda name: (-self.free[name], name))
        chosen = [
            name
            for name in ranked
            if name != asker and name not in wanted.exclude and self.free[name] > 0
        ]
        return control_pb2.BorrowResponse(
            nodes=chosen,
            endpoints=[types_pb2.Endpoints(host=name) for name in chosen],
            free_bytes=[self.free[name] for name in chosen],
            reason="" if chosen else "no node has memory free",
        )

    # All of it --------------------------------------------------------------------------

    def everybody(self) -> Iterator[Node]:
        yield from self.nodes.values()

    def check(self) -> None:
        for node in self.everybody():
            node.check()

    def check_balance(self) -> None:
        """In steady state every loan is the same on both sides, to the byte."""
        lent = {loan.id: loan for node in self.everybody() for loan in node.lent()}
        borrowed = {loan.id: loan for node in self.everybody() for loan in node.borrowed()}
        for loan_id in lent.keys() | borrowed.keys():
            theirs, ours = lent.get(loan_id), borrowed.get(loan_id)
            if ours is not None and ours.state is LoanState.REQUESTED:
                assert theirs is None
                continue
            assert ours is not None
            assert theirs is not None
            assert ours.owed_bytes == theirs.owed_bytes
            if theirs.state is not LoanState.RECALLED:
                assert ours == theirs
        total = sum(loan.owed_bytes for loan in lent.values())
        assert total == sum(node.lending.lent_bytes for node in self.everybody())
        assert total == sum(node.lending.borrowed_bytes for node in self.everybody())

    def missing(self) -> dict[str, list[Key]]:
        """Blocks that a node needs and that nobody has for it, though it had them once."""
        return {node.name: gone for node in self.everybody() if (gone := list(_missing(node)))}


def _missing(node: Node) -> Iterator[Key]:
    for key in node.needed:
        creditor = node.lending.whereabouts(node.namespace, key)
        here = node.shard(key) is not None
        there = creditor is not None and node.town[creditor].shard(key) is not None
        if not (here or there or key in node.hoped):
            yield key


def _place(shard: Shard) -> tuple[NamespaceId, Key]:
    return shard.namespace, shard.key
