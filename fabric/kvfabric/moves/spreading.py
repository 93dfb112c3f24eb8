"""Makes more replicas of what is read much, and takes away what rules made and want no more.

That is extra replicas of shards that have cooled, and those that a shard has beyond a count
which was lowered. Nothing else is taken away: it is cache. A restarted manager knows of none.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from kvfabric.errors import Broken
from kvfabric.moves import sight
from kvfabric.moves.heat import Heat
from kvfabric.moves.migration import Kind
from kvfabric.moves.mover import Mover
from kvfabric.moves.policies import MAX_COUNTS, MAX_REPLICAS, Rules
from kvfabric.moves.sight import Subject
from kvfabric.moves.standing import Standing
from kvfabric.types import Key, NamespaceId, NodeId

LOOK_S = 5.0
HOT_READS_PER_S = 5.0  # of one replica: more, and there should be another
COOL_SHARE = 0.25  # of that, were one replica less: then there is one too many
MAX_EXTRA = 4096  # replicas that may be taken away
MAX_SPREAD = 64  # begun in one look
LOWERED_KEYS = 1024  # looked at in one look


class Spreading:
    """See the module."""

    def __init__(
        self, cluster: sight.Cluster, mover: Mover, rules: Rules, heat: Heat, begin_s: float
    ) -> None:
        """Nothing is done before `begin_s`, when nodes have told a new manager what they hold."""
        self._cluster = cluster
        self._mover = mover
        self._rules = rules
        self._heat = heat
        self._spread = Standing(mover, Kind.SPREAD)
        self._extra: dict[Subject, set[NodeId]] = {}
        self._lowered: dict[Subject, int] = {}  # and how many replicas rules wanted before
        self._look_s = begin_s

    def lowered(self, namespace: NamespaceId, before: Mapping[Key, int]) -> None:
        """These keys had so many replicas by rules, and should have fewer now."""
        for key, replicas in before.items():
            subject = Subject(namespace, key)
            if len(self._lowered) < MAX_COUNTS or subject in self._lowered:
                self._lowered[subject] = max(replicas, self._lowered.get(subject, 0))

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        self._spread.tick(now_s)
        if now_s < self._look_s:
            return
        self._look_s = now_s + LOOK_S
        if self._rules.spreads:
            self._make(now_s)
        self._mark()
        self._take_away(now_s)

    def check(self) -> None:
        """Broken unless bounds are kept."""
        if self._count() > MAX_EXTRA or len(self._lowered) > MAX_COUNTS:
            raise Broken(f"{self._count()} extra replicas, or {len(self._lowered)} are too many")

    # More

    def _make(self, now_s: float) -> None:
        """More replicas of what is read much, at who asks for it."""
        begun = 0
        for namespace, key in self._heat:
            allowed = self._rules.hot_replicas(namespace)
            rate = self._heat.rate(namespace, key, now_s) if allowed else 0.0
            if rate <= HOT_READS_PER_S or begun >= MAX_SPREAD or self._mover.busy(namespace, key):
                continue  # most are not read that much: only what is is looked up
            subject = Subject(namespace, key)
            extra = self._extra.get(subject, set())
            keepers = self._keepers(subject)
            if keepers and len(extra) < allowed and rate / len(keepers) > HOT_READS_PER_S:
                begun += self._make_one(subject, keepers, now_s)

    def _make_one(self, subject: Subject, keepers: set[NodeId], now_s: float) -> bool:
        if self._count() >= MAX_EXTRA:
            return False
        source = sight.one_of(keepers, subject.key)
        size_bytes = sight.shard_bytes(self._cluster, source)
        far = self._mover.targets.best(source, keepers, size_bytes, now_s, evict=True)
        askers = self._heat.askers(*subject)
        near = [node for node in askers if sight.takes(self._cluster, node)]
        chosen = next((node for node in [*near, *far] if node not in keepers), None)
        move = self._spread.wanting(now_s) if chosen is not None else None
        if chosen is None or move is None:
            return False
        self._extra.setdefault(subject, set()).add(chosen)
        namespace, key = subject
        added = self._mover.add(
            move, namespace, [key], source, now_s, destination=chosen, evict=True
        )
        return bool(added)

    # Fewer

    def _mark(self) -> None:
        """Replicas beyond counts that were lowered are extra from now on."""
        room = MAX_EXTRA - self._count()
        for subject, before in list(itertools.islice(self._lowered.items(), LOWERED_KEYS)):
            if room < MAX_REPLICAS:
                return
            del self._lowered[subject]
            if self._mover.busy(*subject):
                self._lowered[subject] = before  # again, after the others
            elif not self._rules.pinned(*subject):
                extra = self._extra.get(subject, set())
                keepers = self._keepers(subject) - extra
                surplus = min(len(keepers), before) - self._rules.replicas(*subject)
                if surplus > 0:
                    self._extra[subject] = extra | self._crowded(keepers, surplus)
                    room -= surplus

    def _crowded(self, keepers: set[NodeId], count: int) -> set[NodeId]:
        """So many of the nodes; those that are left stand in as many zones as they can."""
        left = set(keepers)
        for _ in range(count):
            fewer = {node: sight.zones(self._cluster, left - {node}) for node in left}
            left.remove(max(left, key=lambda node: (fewer[node], node)))
        return keepers - left

    def _take_away(self, now_s: float) -> None:
        """Extra replicas of what is read less now, or has more than are allowed."""
        going: dict[tuple[NodeId, NamespaceId], list[Key]] = {}
        for subject, nodes in list(self._extra.items()):
            if self._mover.busy(*subject):
                continue
            keepers = self._keepers(subject)
            nodes &= keepers  # one that is gone, or never came, is none
            if not nodes:
                del self._extra[subject]
            elif self._too_many(subject, len(nodes), len(keepers), now_s) and (
                spare := self._spare(subject, nodes, keepers)
            ):
                going.setdefault((spare, subject.namespace), []).append(subject.key)
        for (node, namespace), keys in sorted(going.items()):
            move = self._spread.wanting(now_s)
            if move is None:
                return
            for key in keys:
                self._extra[Subject(namespace, key)].discard(node)
            self._mover.add_drop(move, namespace, keys, node, now_s)

    def _too_many(self, subject: Subject, extra: int, keepers: int, now_s: float) -> bool:
        """Whether one of the extra replicas is to go now."""
        fewer = keepers - 1
        if fewer < self._rules.replicas(*subject):
            return False
        rate = self._heat.rate(*subject, now_s)
        cool = rate / fewer < COOL_SHARE * HOT_READS_PER_S
        return cool or extra > self._rules.hot_replicas(subject.namespace)

    def _spare(self, subject: Subject, extra: set[NodeId], keepers: set[NodeId]) -> NodeId | None:
        """One of the extra ones without which there are as many zones as rules want."""
        zones = sight.zones(self._cluster, keepers)
        wanted = min(self._rules.replicas(*subject), zones)
        spare = [n for n in extra if sight.zones(self._cluster, keepers - {n}) >= wanted]
        return max(spare, default=None)

    # Inside

    def _keepers(self, subject: Subject) -> set[NodeId]:
        (place,) = sight.places(self._cluster, subject.namespace, [subject.key])
        return sight.keepers(self._cluster, place)

    def _count(self) -> int:
        """How many replicas are extra."""
        return sum(len(nodes) for nodes in self._extra.values())
