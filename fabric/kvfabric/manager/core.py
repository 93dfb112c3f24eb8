"""The gManager's decisions: events and the time go in, answers come out.

Pure and deterministic: no clock, no I/O, no locks. What it knows of shards is
rebuilt from the nodes; a directory that may be wrong is never mended by guessing,
the node is asked for a full report instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvfabric.directory import Directory, Inventory, Located
from kvfabric.errors import Broken
from kvfabric.manager.events import (
    Answer,
    Cause,
    Delta,
    Explained,
    Explanation,
    Heartbeat,
    Lost,
    Outcome,
    Register,
    Registered,
)
from kvfabric.manager.journal import JournalEvent
from kvfabric.manager.lending import Lending
from kvfabric.manager.moving import Moving
from kvfabric.manager.nearness import best_first
from kvfabric.manager.parts import Cluster, Part
from kvfabric.manager.planning import Planning
from kvfabric.manager.repaying import Repaying
from kvfabric.membership import Hearing, Member, Membership, NodeState
from kvfabric.types import Key, NamespaceId, NodeId

MAX_EXPLAINED_KEYS = 16
MAX_LOST = 128  # nodes given up in one tick; of a cluster that falls silent the rest follow


class ManagerCore:
    """One manager's knowledge. Not thread-safe: its shell calls it from one thread at a time.

    `now_s` only goes forward; its zero means nothing.
    """

    def __init__(self, silence_s: float, now_s: float) -> None:
        self._silence_s = silence_s
        self._members = Membership(silence_s)
        self._directory = Directory()
        self.cluster = Cluster(self._members, self._directory)
        self.lending = Lending(self.cluster)
        self.planning = Planning(self.cluster)
        repaying = Repaying(self.cluster, self.planning.waiting)
        self.moving = Moving(self.cluster, silence_s, now_s)
        self._parts: list[Part] = [self.lending, self.planning, repaying, self.moving]
        # What a node said it holds, where its last message was to be believed as it is.
        self._claims: dict[NodeId, Inventory] = {}
        self._reporting: set[NodeId] = set()  # in the middle of a full report
        self._ticked_s = now_s

    # Nodes

    def register(self, event: Register, now_s: float) -> Registered:
        """Take in a node's start. Safe to repeat. Retry where there are too many nodes.

        The same incarnation again changes its endpoints and nothing else; an older one
        is fenced; a newer one drops what the older held.
        """
        known = self._members.known_incarnation(event.node)
        if event.incarnation < known:
            return Registered(known)
        if event.incarnation == known:
            self._greet(event, now_s)
            return Registered(0)
        forgotten = self._members.admit(
            event.node, event.incarnation, event.endpoints, event.stats, event.labels, now_s
        )
        if forgotten is not None:
            self._claims.pop(forgotten, None)
            self.cluster.orders.forget(forgotten)
        self._reporting.discard(event.node)
        self._directory.drop(event.node)
        self._claims[event.node] = Inventory()
        if known:
            self._tell_lost(event.node, now_s)
        self._note(event.node, "registered", f"incarnation {event.incarnation}", now_s)
        return Registered(0)

    def heartbeat(self, event: Heartbeat, now_s: float) -> Answer:
        """Take in what a node says of itself, and answer it.

        A duplicate changes nothing. What a full report says is shown when it is whole
        and its count and hash are right, not before.
        """
        hearing = self._members.hear(
            event.node, event.incarnation, event.stream, event.sequence, now_s
        )
        if hearing is Hearing.STRANGER:
            return Answer(event.sequence, Outcome.STRANGER, want_register=True)
        member = self._members[event.node]
        if hearing is Hearing.DUPLICATE:
            return Answer(event.sequence, Outcome.DUPLICATE, self._wants_full(member))
        if event.stats is not None:
            member.stats = event.stats
        cause = self._lapse(member, hearing)
        applied = self._apply(member, event, now_s)
        if isinstance(applied, Cause):
            cause = applied
        if cause is not None and member.state is NodeState.RESYNC:
            self._note(event.node, "full report wanted", cause.value, now_s)
        for part in self._parts:
            part.heard(member, event, now_s)
        wants = self._wants_full(member)
        return Answer(
            event.sequence,
            Outcome.APPLIED if applied is True else Outcome.DISTRUSTED,
            wants,
            cause=cause if wants else None,
            commands=self.cluster.orders.take(event.node),
            draining=event.node in self.cluster.draining,
        )

    def tick(self, now_s: float) -> list[Lost]:
        """Time has passed: find the nodes that fell silent, and tidy a little.

        Must come several times within the silence that is allowed. If it did not, we
        were stopped ourselves, and nobody is blamed for what we did not hear.
        """
        if now_s - self._ticked_s > self._silence_s / 2:
            self._members.excuse(now_s)
        self._ticked_s = now_s
        lost = []
        for node in self._members.silent(now_s)[:MAX_LOST]:
            member = self._members[node]
            self._members.move(node, NodeState.LOST)
            self._reporting.discard(node)
            self._claims.pop(node, None)
            replicas = self._directory.drop(node)
            silent_s = now_s - member.heard_s
            self._note(node, "lost", f"silent for {silent_s:.1f} s", now_s)
            self._tell_lost(node, now_s)
            lost.append(Lost(node, member.incarnation, replicas))
        for part in self._parts:
            part.tick(now_s)
        self._directory.sweep()
        return lost

    # Questions

    def locate(
        self,
        namespace: NamespaceId,
        keys: Sequence[Key],
        *,
        prefix: bool,
        asker: NodeId | None = None,
    ) -> Located:
        """See Directory.locate. Replicas come nearest to `asker` first, then by tier and load."""
        found = self._directory.locate(namespace, keys, prefix=prefix)
        if asker is not None:
            self.moving.asked(namespace, keys, asker)
        if all(len(place) == 1 for place in found.places):
            return found
        return Located(found.indices, best_first(self.cluster, asker, found.places))

    def members(self) -> list[Member]:
        """Every node, in the order of their names. Not to be changed by the caller."""
        return list(self._members)

    def states(self) -> dict[NodeState, int]:
        """How many nodes are in each state."""
        states = [member.state for member in self._members]
        return {state: states.count(state) for state in NodeState}

    @property
    def keys(self) -> int:
        """Keys with at least one replica."""
        return self._directory.keys

    @property
    def replicas(self) -> int:
        """Replicas of all keys."""
        return self._directory.replicas

    def explain(self, namespace: NamespaceId | None, prefix: bytes, now_s: float) -> Explanation:
        """What is known of keys that start with `prefix`, in `namespace` or (None) in any.

        Places and counts are those of the first MAX_EXPLAINED_KEYS keys found.
        """
        found = self._directory.find(prefix, namespace, MAX_EXPLAINED_KEYS)
        nodes = {replica.node for _, _, place in found for replica in place}
        events = tuple(
            Explained(now_s - event.at_s, event.node, event.what, event.why)
            for event in self.cluster.journal.explain(namespace, prefix, nodes)
        )
        wanted = tuple(self.moving.rules.replicas(room, key) for room, key, _ in found)
        return Explanation(events, tuple(place for _, _, place in found), wanted)

    def check(self) -> None:
        """Broken unless all books agree. Reads every key."""
        self._directory.check()
        self._members.check()
        self.cluster.orders.check()
        for part in self._parts:
            part.check()
        for member in self._members:
            held = self._directory.inventory(member.node)
            draft = self._directory.inventory(member.node, draft=True)
            if member.state is NodeState.LOST and held != Inventory():
                raise Broken(f"{member.node} is lost and yet holds {held}")
            claim = self._claims.get(member.node)
            if member.state is NodeState.LIVE and claim not in (None, held):
                raise Broken(f"{member.node} said {claim}, the directory says {held}")
            if member.node not in self._reporting and draft != Inventory():
                raise Broken(f"{member.node} has a draft and gives no report")

    # Inside

    def _tell_lost(self, node: NodeId, now_s: float) -> None:
        self.cluster.orders.forget(node)
        for part in self._parts:
            part.lost(node, now_s)

    def _greet(self, event: Register, now_s: float) -> None:
        """The incarnation that we know registers again: its stream broke."""
        member = self._members[event.node]
        member.endpoints = event.endpoints
        member.labels = dict(event.labels)
        member.heard_s = now_s

    def _lapse(self, member: Member, hearing: Hearing) -> Cause | None:
        """What this heartbeat's coming tells of those before it."""
        if member.state is NodeState.LOST:
            self._members.move(member.node, NodeState.RESYNC)
            return Cause.RETURNED
        if hearing is Hearing.GAP:
            return self._distrust(member, Cause.GAP)
        return None

    def _apply(self, member: Member, event: Heartbeat, now_s: float) -> bool | Cause:
        """Whether the books agree with the message, or why a full report is wanted."""
        if event.full:
            return self._apply_report(member, event, now_s)
        if member.node in self._reporting:
            return self._distrust(member, Cause.BROKEN_OFF)
        if member.state is not NodeState.LIVE:
            return False
        self._change(event, draft=False)
        self._note_keys(event, now_s)
        return self._settle(member, event)

    def _settle(self, member: Member, event: Heartbeat) -> bool | Cause:
        """Compare the books after a delta; a part of a larger one (`more`) need not agree yet."""
        if event.more:
            self._claims.pop(member.node, None)
            return True
        self._claims[member.node] = event.inventory
        if self._directory.inventory(member.node) != event.inventory:
            return self._distrust(member, Cause.DRIFT)
        return True

    def _apply_report(self, member: Member, event: Heartbeat, now_s: float) -> bool | Cause:
        self._reporting.add(member.node)
        self._change(event, draft=True)
        if event.more:
            return True
        self._reporting.remove(member.node)
        if self._directory.inventory(member.node, draft=True) != event.inventory:
            return self._distrust(member, Cause.MISMATCH)
        self._directory.publish(member.node)
        self._claims[member.node] = event.inventory
        if member.state is not NodeState.LIVE:
            self._members.move(member.node, NodeState.LIVE)
        self._note(member.node, "full report", f"{event.inventory.count} shards", now_s)
        return True

    def _distrust(self, member: Member, cause: Cause) -> Cause:
        """The books may be wrong: no more deltas, and what was begun is thrown away."""
        self._reporting.discard(member.node)
        self._directory.discard_draft(member.node)
        if member.state is NodeState.LIVE:
            self._members.move(member.node, NodeState.RESYNC)
        return cause

    def _wants_full(self, member: Member) -> bool:
        return member.state is NodeState.RESYNC and member.node not in self._reporting

    def _change(self, event: Heartbeat, *, draft: bool) -> None:
        # A key that is in both was dropped and is back: the node tells net effects.
        for delta in event.removed:
            self._directory.remove(event.node, delta.namespace, delta.tier, delta.keys, draft=draft)
        for delta in event.added:
            self._directory.add(event.node, delta.namespace, delta.tier, delta.keys, draft=draft)

    def _note(self, node: NodeId, what: str, why: str, now_s: float) -> None:
        self.cluster.journal.note(JournalEvent(now_s, node, what, why))

    def _note_keys(self, event: Heartbeat, now_s: float) -> None:
        def note(what: str, delta: Delta) -> None:
            why = f"heartbeat {event.sequence}, {delta.tier.name.lower()}"
            self.cluster.journal.note(
                JournalEvent(now_s, event.node, what, why, delta.namespace, delta.keys)
            )

        for delta in event.removed:
            note("removed", delta)
        for delta in event.added:
            note("added", delta)
