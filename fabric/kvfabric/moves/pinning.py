"""Pins over the whole fabric: every replica of a pinned key is pinned, wherever it turns up.

Whether a node has pinned something cannot be seen, so pins are told again from time to
time, and at once where a replica comes or a node starts anew. On a node that is being
emptied the pin ends once another node has had the time to pin its own replica.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvfabric.moves import sight
from kvfabric.moves.policies import Rules
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import DIGEST_BYTES, Key, NamespaceId, NodeId

RESEND_S = 60.0
SETTLE_S = 5.0  # a pin that was told so long ago is believed in
RELEASE_S = 600.0  # so long an unpin is told to whoever has the shard
SLICE_KEYS = 4096  # looked at in one round
COMMAND_KEYS = 1024
MAX_RELEASED = 65_536


class _Told(NamedTuple):
    pinned: bool
    incarnation: int
    first_s: float
    last_s: float


_Subject = tuple[NamespaceId, Key]


class Pinning:
    """See the module."""

    def __init__(self, cluster: sight.Cluster, rules: Rules) -> None:
        self._cluster = cluster
        self._rules = rules
        self._told: dict[_Subject, dict[NodeId, _Told]] = {}
        self._released: dict[_Subject, float] = {}  # until when they are told to be free
        self._round: list[_Subject] = []  # what is still to be looked at

    def release(self, namespace: NamespaceId, keys: Iterable[Key], now_s: float) -> None:
        """These are pinned no more: whoever has them is told, at once and for a while."""
        gone = [(namespace, key) for key in keys]
        for subject in gone:
            self._told.pop(subject, None)
            self._released.pop(subject, None)
            self._released[subject] = now_s + RELEASE_S
        while len(self._released) > MAX_RELEASED:
            del self._released[next(iter(self._released))]
        self._look(gone, now_s)

    def pin(self, namespace: NamespaceId, keys: Iterable[Key], now_s: float) -> None:
        """These are pinned now."""
        new = [(namespace, key) for key in keys]
        for subject in new:
            self._released.pop(subject, None)
            self._told.pop(subject, None)
        self._look(new, now_s)

    def added(self, namespace: NamespaceId, keys: bytes, now_s: float) -> None:
        """Replicas of these keys (32 bytes each) have come somewhere."""
        if not self._rules.pins.any_in(namespace):
            return
        each = [Key(keys[at : at + DIGEST_BYTES]) for at in range(0, len(keys), DIGEST_BYTES)]
        mine = [(namespace, key) for key in each if self._rules.pinned(namespace, key)]
        self._look(mine, now_s)

    def tick(self, now_s: float) -> None:
        """Looks at some of the pins, in turn."""
        if not self._round:
            for subject in [each for each, end_s in self._released.items() if end_s <= now_s]:
                del self._released[subject]
                self._told.pop(subject, None)
            pinned = [(namespace, key) for namespace, key, _ in self._rules.pins]
            self._round = [*pinned, *self._released]
        part, self._round = self._round[:SLICE_KEYS], self._round[SLICE_KEYS:]
        self._look(part, now_s)

    def _look(self, subjects: Iterable[_Subject], now_s: float) -> None:
        by_room: dict[NamespaceId, list[Key]] = {}
        for namespace, key in subjects:
            by_room.setdefault(namespace, []).append(key)
        orders: dict[tuple[NodeId, NamespaceId, bool], list[Key]] = {}
        for namespace, keys in by_room.items():
            located = self._cluster.directory.locate(namespace, keys, prefix=False)
            places = [{replica.node for replica in place} for place in located.places]
            for key, index in zip(keys, located.indices, strict=True):
                nodes = places[index] if index < len(places) else set()
                self._judge((namespace, key), nodes, orders, now_s)
        for (node, namespace, pinned), keys in sorted(orders.items()):
            for first in range(0, len(keys), COMMAND_KEYS):
                self._order(node, namespace, keys[first : first + COMMAND_KEYS], pinned, now_s)

    def _judge(
        self,
        subject: _Subject,
        nodes: set[NodeId],
        orders: dict[tuple[NodeId, NamespaceId, bool], list[Key]],
        now_s: float,
    ) -> None:
        """What the holders of one key are to be told now."""
        namespace, key = subject
        told = self._told.get(subject, {})
        for node in [each for each in told if each not in nodes]:
            del told[node]
        wanted = self._rules.pinned(namespace, key)
        safe = any(self._settled(told.get(node), node, now_s) for node in nodes)
        for node in sorted(nodes):
            pinned = wanted and not (safe and node in self._cluster.draining)
            if not sight.away(self._cluster, node) or node in self._cluster.draining:
                incarnation = self._cluster.members[node].incarnation
                last = told.get(node)
                fresh = last is not None and last[:2] == (pinned, incarnation)
                if last is not None and fresh and now_s - last.last_s < RESEND_S:
                    continue
                first_s = last.first_s if last is not None and fresh else now_s
                told = self._told.setdefault(subject, told)
                told[node] = _Told(pinned, incarnation, first_s, now_s)
                orders.setdefault((node, namespace, pinned), []).append(key)
        if not told:
            self._told.pop(subject, None)

    def _settled(self, told: _Told | None, node: NodeId, now_s: float) -> bool:
        """Whether the node's replica is pinned by all that can be known, and stays."""
        return (
            told is not None
            and told.pinned
            and now_s - told.first_s >= SETTLE_S
            and sight.takes(self._cluster, node)
            and self._cluster.members[node].incarnation == told.incarnation
        )

    def _order(
        self, node: NodeId, namespace: NamespaceId, keys: list[Key], pinned: bool, now_s: float
    ) -> None:
        what = control_pb2.Command.Pin(namespace_id=namespace, keys=b"".join(keys), pinned=pinned)
        why = "pinned over the whole fabric" if pinned else "the pin has ended here"
        if not self._cluster.order(node, control_pb2.Command(why=why, pin=what), now_s):
            for key in keys:  # no room in the queue: told in the next round
                self._told.get((namespace, key), {}).pop(node, None)
