"""Empties nodes while they serve: what they hold is moved or let go of, loans and sequences too.

A node is empty when its own statistics say so, not when nothing is left to command. What
it holds is found in the directory, a slice at a time, until a whole walk finds nothing; so
a restarted manager simply begins the walk anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from kvfabric.directory import Cursor, Lot, Place
from kvfabric.errors import Broken
from kvfabric.lending.ledger import Ledger
from kvfabric.moves import sight
from kvfabric.moves.heads import Heads
from kvfabric.moves.heat import Heat
from kvfabric.moves.migration import BATCH_KEYS, Kind, Move
from kvfabric.moves.mover import MAX_MOVES, MAX_WAITING, Mover
from kvfabric.moves.policies import Drain, Rules
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Key, NamespaceId, NodeId

MAX_DRAINS = MAX_MOVES // 4  # nodes that are being emptied at once; others wait for their turn
ROUND_S = 1.0  # between the end of a walk over the node's keys and the next
SLICE_KEYS = 16_384
RESEND_S = 10.0  # of what is told to lend out, and to recall
HAND_OVER_S = 2.0  # likewise of states: their clients wait
LEND_FIRST_S = 5.0  # sequences are lent out before anything else is copied, for so long
RECALL_DEADLINE_MS = 30_000
CONFIRMATIONS = 2  # heartbeats after which a node has surely heard that it is to take nothing in


@dataclass(slots=True)
class _Emptying:
    """One node on its way to be empty."""

    node: NodeId
    move: Move
    begun_s: float
    heartbeats: int = 0
    cursor: Cursor | None = None
    round_s: float = 0.0  # the next walk begins
    lots: deque[Lot] = field(default_factory=deque)  # found and not yet taken up
    told_s: float = float("-inf")  # when sequences and loans were dealt with last
    handed_s: float = float("-inf")  # when states were
    handed: int = 0  # how often


class Draining:
    """See the module. The rules say which nodes.

    `changed` has nodes whose rule was changed here, and is still to be written down.
    """

    def __init__(
        self,
        cluster: sight.Cluster,
        mover: Mover,
        rules: Rules,
        heat: Heat,
        ledger: Ledger,
        heads: Heads,
    ) -> None:
        self._cluster = cluster
        self._mover = mover
        self._rules = rules
        self._heat = heat
        self._ledger = ledger
        self._heads = heads
        self._emptying: dict[NodeId, _Emptying] = {}
        self._sequences: dict[NodeId, control_pb2.Sequences] = {}
        self.changed: list[NodeId] = []

    def begin(self, node: NodeId, drain: Drain, now_s: float) -> None:
        """The rule is there. May be repeated; only the rate may be another."""
        self._rules.drains[node] = drain
        self._cluster.draining.add(node)
        emptying = self._emptying.get(node)
        if emptying is not None:
            emptying.move.bytes_per_s = drain.bytes_per_s

    def cancel(self, node: NodeId, now_s: float) -> None:
        """The node serves again, with what it still holds. May be repeated."""
        self._rules.drains.pop(node, None)
        self._cluster.draining.discard(node)
        emptying = self._emptying.pop(node, None)
        if emptying is not None and not emptying.move.ended:
            self._mover.cancel(emptying.move.number, now_s)

    def heard(self, node: NodeId, sequences: control_pb2.Sequences | None, now_s: float) -> None:
        """A heartbeat has come; `sequences`, if given, are all of the node's."""
        if sequences is not None:
            self._sequences[node] = control_pb2.Sequences()
            self._sequences[node].CopyFrom(sequences)
        emptying = self._emptying.get(node)
        if emptying is not None:
            emptying.heartbeats += 1
            self._feed(emptying, now_s)

    def lost(self, node: NodeId, now_s: float) -> None:
        """What the node held is gone, its sequences too."""
        self._sequences.pop(node, None)
        emptying = self._emptying.get(node)
        if emptying is not None:
            emptying.heartbeats = 0
            emptying.lots.clear()
            emptying.cursor = None

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        for node in sorted(self._rules.drains):
            self._cluster.draining.add(node)
            if self._came_back(node, now_s):
                continue
            emptying = self._emptying.get(node) or self._begin(node, now_s)
            if emptying is not None and sight.live(self._cluster, node):
                self._hand_over(emptying, now_s)
                if now_s - emptying.told_s >= RESEND_S:
                    emptying.told_s = now_s
                    self._lend_out(node, now_s)
                    self._recall(node, now_s)
                self._feed(emptying, now_s)

    def told(self, node: NodeId, now_s: float) -> control_pb2.DrainResponse:
        """How far it is. `node` is one that is being emptied."""
        known = sight.member(self._cluster, node)
        emptying = self._emptying.get(node)
        waiting = self.waits_for(node, now_s)
        return control_pb2.DrainResponse(
            empty=not waiting,
            left_shards=self._cluster.directory.inventory(node).count,
            left_bytes=sight.used_bytes(known) if known else 0,
            moved_shards=emptying.move.dropped if emptying else 0,
            lent_bytes=self._ledger.lent_bytes(node),
            borrowed_bytes=self._ledger.borrowed_bytes(node),
            waiting=waiting,
        )

    def waits_for(self, node: NodeId, now_s: float) -> str:
        """What keeps it from being empty; nothing: it may be deleted."""
        known = sight.member(self._cluster, node)
        if known is None:
            return f"{node} never registered with this manager: is the name right?"
        if not sight.live(self._cluster, node):
            return f"{node} was not heard for {now_s - known.heard_s:.0f} s"
        emptying = self._emptying.get(node)
        if emptying is None:
            return f"{MAX_DRAINS} other nodes are emptied first"
        if emptying.heartbeats < CONFIRMATIONS:
            return f"{node} is told to take nothing in"
        causes = self._causes(emptying)
        if not causes and sight.used_bytes(known):
            causes.append("clients that have not let go of memory")
        return ", ".join(causes)

    def check(self) -> None:
        """Broken unless books agree."""
        if not self._emptying.keys() <= self._rules.drains.keys():
            raise Broken("a node is emptied that nobody wants to be empty: a bug")
        if len(self._emptying) > MAX_DRAINS:
            raise Broken(f"{len(self._emptying)} nodes are emptied, over {MAX_DRAINS}: a bug")

    # Inside

    def _causes(self, emptying: _Emptying) -> list[str]:
        node = emptying.node
        known = self._cluster.members[node]
        shards = self._cluster.directory.inventory(node).count
        sequences = self._sequences.get(node)
        waiting, copying, dropping = self._mover.phases(emptying.move)
        counts = [
            (shards, "shards"),
            (len(sequences.sequence) if sequences else 0, "open sequences"),
            (self._heads.count(node), "states"),
            (known.stats.reservations, "writes under way"),
            (known.stats.leases, "leases"),
            (known.stats.pins, "pins"),
        ]
        causes = [f"{count:,} {what}" for count, what in counts if count]
        for size_bytes, what in (
            (self._ledger.lent_bytes(node), "held for other nodes"),
            (self._ledger.borrowed_bytes(node), "on loan from other nodes"),
        ):
            if size_bytes:
                causes.append(f"{size_bytes:,} bytes {what}")
        if waiting and not copying and not dropping:
            causes.append("room on other nodes")
        return causes

    def _begin(self, node: NodeId, now_s: float) -> _Emptying | None:
        known = sight.member(self._cluster, node)
        if known is None or len(self._emptying) >= MAX_DRAINS or self._mover.full:
            return None
        rate = self._rules.drains[node].bytes_per_s
        move = self._mover.begin(Kind.DRAIN, now_s, source=node, bytes_per_s=rate)
        self._emptying[node] = _Emptying(node, move, now_s)
        return self._emptying[node]

    def _came_back(self, node: NodeId, now_s: float) -> bool:
        """Whether the node was started anew since with nothing to be moved: it serves again.

        One that was started anew with its shards is emptied on.
        """
        known = sight.member(self._cluster, node)
        drain = self._rules.drains[node]
        if (
            known is None
            or known.incarnation <= drain.incarnation
            or known.sequence is None
            or not sight.live(self._cluster, node)
        ):
            return False
        self.changed.append(node)
        if self._cluster.directory.inventory(node).count or sight.used_bytes(known):
            self._rules.drains[node] = replace(drain, incarnation=known.incarnation)
            return False
        self.cancel(node, now_s)
        return True

    def _feed(self, emptying: _Emptying, now_s: float) -> None:
        """As many of the node's keys as the mover wants."""
        if emptying.move.ended:  # somebody cancelled the move: the rule stands, and begins anew
            del self._emptying[emptying.node]
            return
        if now_s - emptying.begun_s < LEND_FIRST_S and self._local_bytes(emptying.node):
            return
        if not emptying.lots:
            self._find(emptying, now_s)
        while emptying.lots and self._mover.wants(emptying.move):
            lot = emptying.lots.popleft()
            some = BATCH_KEYS * MAX_WAITING
            if lot.keys[some:]:
                emptying.lots.appendleft(lot._replace(keys=lot.keys[some:]))
            alike = self._rules.by_replicas(lot.namespace, lot.keys[:some])
            for replicas, keys in alike.items():
                self._take(emptying, lot._replace(keys=keys), replicas, now_s)

    def _find(self, emptying: _Emptying, now_s: float) -> None:
        if emptying.cursor is None and now_s < emptying.round_s:
            return
        lots, emptying.cursor = self._cluster.directory.pick(
            holding(emptying.node), emptying.cursor, SLICE_KEYS
        )
        emptying.lots.extend(lots)
        if emptying.cursor is None:
            emptying.round_s = now_s + ROUND_S

    def _take(self, emptying: _Emptying, lot: Lot, replicas: int, now_s: float) -> None:
        """What has replicas enough elsewhere only goes; the rest is copied first."""
        needed = min(replicas, len(sight.takers(self._cluster)))
        keepers = sight.keepers(self._cluster, lot.place, but=emptying.node)
        if len(keepers) >= max(1, needed):
            self._mover.add_drop(emptying.move, lot.namespace, lot.keys, emptying.node, now_s)
            return
        dear = [key for key in lot.keys if self._dear(lot.namespace, key, now_s)]
        rest = set(lot.keys).difference(dear)
        cold = [key for key in lot.keys if key in rest]
        move, node = emptying.move, emptying.node
        self._mover.add(move, lot.namespace, dear, node, now_s, evict=True)
        # A copy elsewhere that is too few is still one: only what has none may be given up.
        self._mover.add(
            move, lot.namespace, cold, node, now_s, evict=bool(keepers), may_give_up=not keepers
        )

    def _dear(self, namespace: NamespaceId, key: Key, now_s: float) -> bool:
        """Whether colder cache elsewhere should go for it, where there is no room."""
        return (
            self._rules.replicas(namespace, key) > 1
            or self._rules.pinned(namespace, key)
            or self._heat.rate(namespace, key, now_s) > 0
        )

    def _local_bytes(self, node: NodeId) -> int:
        sequences = self._sequences.get(node)
        return sum(sequences.local_bytes) if sequences else 0

    def _lend_out(self, node: NodeId, now_s: float) -> None:
        """The node's open sequences keep nothing at home: what they need is lent elsewhere."""
        sequences = self._sequences.get(node)
        if sequences is None:
            return
        rows = zip(sequences.sequence, sequences.local_bytes, strict=True)
        for number, (sequence, size_bytes) in enumerate(rows):
            creditors = self._mover.targets.best(node, (), size_bytes, now_s, evict=True)
            if not size_bytes or not creditors:
                continue
            creditor = creditors[number % len(creditors)]
            what = control_pb2.Command.LendOut(
                sequence=sequence,
                size_bytes=size_bytes,
                creditor=creditor,
                endpoints=self._cluster.members[creditor].endpoints,
            )
            command = control_pb2.Command(why=f"{node} is being drained", lend_out=what)
            self._cluster.order(node, command, now_s)

    def _hand_over(self, emptying: _Emptying, now_s: float) -> None:
        """The node's states go to another one; each time to the next, where one would not do."""
        node = emptying.node
        if now_s - emptying.handed_s < HAND_OVER_S or not self._heads.count(node):
            return
        size_bytes = sight.shard_bytes(self._cluster, node)
        takers = self._mover.targets.best(node, (), size_bytes, now_s, evict=True)
        if not takers:
            return
        destination = takers[emptying.handed % len(takers)]
        what = control_pb2.Command.HandOver(
            destination=destination, endpoints=self._cluster.members[destination].endpoints
        )
        command = control_pb2.Command(why=f"{node} is being drained", hand_over=what)
        if self._cluster.order(node, command, now_s):
            emptying.handed_s = now_s
            emptying.handed += 1

    def _recall(self, node: NodeId, now_s: float) -> None:
        """What the node holds for others goes to other creditors, or home."""
        for debtor in sorted({loan.debtor for loan in self._ledger.lent(node)}):
            known = sight.member(self._cluster, NodeId(debtor))
            if known is None:
                continue
            what = control_pb2.Command.Recall(
                debtor=debtor, endpoints=known.endpoints, deadline_ms=RECALL_DEADLINE_MS
            )
            command = control_pb2.Command(why=f"{node} is being drained", recall=what)
            self._cluster.order(node, command, now_s)


def holding(node: NodeId) -> Callable[[Place], bool]:
    """Whether a place has a replica on the node."""
    return lambda place: any(replica.node == node for replica in place)
