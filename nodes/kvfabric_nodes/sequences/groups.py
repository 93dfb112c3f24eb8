"""Groups: the prefixes that a batch of requests shares stay for the batch's life.

The keys that two or more chains have are claimed, whether they are here already, lie
elsewhere or are yet to be computed. When the group ends, what came here meanwhile and
nobody else needs is freed; what was here before is ordinary cache again. A shard that
leaves this node takes its claims along: another node keeps it for the rest of the group's
life, in a group of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvfabric.errors import Refused, Retry
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.promises import Session

Name = tuple[NamespaceId, Key]


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """Every limit of groups, by name."""

    groups: int = 4096  # on a node
    life_s: float = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A group of another node that keeps what one of this node kept."""

    node: str
    endpoints: bytes  # types_pb2.Endpoints
    group: int


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    id: int
    session: Session | None  # None: it stands for another node's group
    namespace: NamespaceId
    keys: dict[Key, None]  # that are kept here, in the order of their chains
    found: frozenset[Key]  # those that were here when it began
    deadline_s: float
    elsewhere: list[Elsewhere] = field(default_factory=list)


def shared(keys: Sequence[Key], lengths: Sequence[int]) -> list[int]:
    """Indices of the keys that two or more of the chains have, once each."""
    if sum(lengths) != len(keys):
        raise Refused(f"chains of {sum(lengths)} keys in all, but {len(keys)} keys are given")
    first: dict[Key, int] = {}
    chains: Counter[Key] = Counter()
    start = 0
    for length in lengths:
        for index in range(start, start + length):
            first.setdefault(keys[index], index)
        chains.update(set(keys[start : start + length]))
        start += length
    return [index for key, index in first.items() if chains[key] >= 2]


class Groups:
    """See the module. All times are seconds of one monotonic clock."""

    def __init__(
        self, core: NodeCore, limits: GroupLimits | None = None, first_id: int = 1
    ) -> None:
        self.core = core
        self.limits = limits or GroupLimits()
        self.all: dict[int, Group] = {}
        self.to_close: list[Elsewhere] = []  # whose groups here have ended; emptied by the shell
        self._of: dict[Name, dict[int, Group]] = {}  # who claims each key
        self._next_id = first_id
        core.on_closed.append(self._session_ended)

    def open(
        self,
        session: Session,
        namespace: NamespaceId,
        keys: Sequence[Key],
        life_s: float,
        now_s: float,
        *,
        detached: bool = False,
    ) -> Group:
        """Keeps these keys, each named once, until the group ends.

        `detached`: another node's, which outlives the session.
        """
        self.core.admit(session, namespace, len(keys))
        if len(self.all) >= self.limits.groups:
            raise Retry(f"{len(self.all)} groups are open on this node; close some, or wait")
        room = self.core.shards.room(namespace)
        group = Group(
            self._next_id,
            None if detached else session,
            namespace,
            dict.fromkeys(keys),
            frozenset(key for key in keys if key in room),
            now_s + self.bounded(life_s),
        )
        self._next_id += 1
        self.all[group.id] = group
        for key in group.keys:
            self.core.shards.claim(namespace, key)
            self._of.setdefault((namespace, key), {})[group.id] = group
        return group

    def bounded(self, life_s: float) -> float:
        return min(life_s, self.limits.life_s)

    def close(self, session: Session, group_id: int, now_s: float) -> tuple[int, int]:
        """Ends it: (shards, bytes) that are freed."""
        group = self.all.get(group_id)
        own = group is not None and (
            session.between_nodes if group.session is None else group.session is session
        )
        if group is None or not own:
            raise Refused(f"this session has no group {group_id}: it ended, or was closed before")
        return self._end(group, now_s)

    def of(self, namespace: NamespaceId, key: Key) -> list[Group]:
        """Those that claim this key here."""
        return list(self._of.get((namespace, key), {}).values())

    def hand_over(self, group_id: int, keys: Iterable[Key], place: Elsewhere, now_s: float) -> None:
        """Another node keeps these from now on; it is told when the group ends."""
        group = self.all.get(group_id)
        if group is None:
            self.to_close.append(place)
            return
        group.elsewhere.append(place)
        for key in keys:
            if key in group.keys:
                del group.keys[key]
                self._unclaim(group, key, now_s)

    def tick(self, now_s: float) -> None:
        """Ends the groups whose life is over."""
        for group in [g for g in self.all.values() if g.deadline_s <= now_s]:
            self._end(group, now_s)

    def _session_ended(self, session: Session, now_s: float) -> None:
        for group in [g for g in self.all.values() if g.session is session]:
            self._end(group, now_s)

    def _unclaim(self, group: Group, key: Key, now_s: float) -> None:
        groups = self._of[group.namespace, key]
        del groups[group.id]
        if not groups:
            del self._of[group.namespace, key]
        self.core.end_of_claim(group.namespace, key, now_s)

    def _end(self, group: Group, now_s: float) -> tuple[int, int]:
        del self.all[group.id]
        self.to_close += group.elsewhere
        shards = size_bytes = 0
        for key in reversed(group.keys):
            self._unclaim(group, key, now_s)
            shard = self.core.shards.get(group.namespace, key)
            if shard is None or key in group.found:
                continue
            if not shard.pinned and not self.core.shards.claimed(shard):
                self.core.drop(shard, "dropped", "its group has ended", now_s)
                shards += 1
                size_bytes += shard.size_bytes
        return shards, size_bytes

    def claims(self) -> Counter[Name]:
        """How many groups claim each key."""
        return Counter((g.namespace, key) for g in self.all.values() for key in g.keys)

    def check(self) -> None:
        """Asserts that every group's session lives and its keys are claimed."""
        for group_id, group in self.all.items():
            assert group.id == group_id
            assert group.session is None or group.session.id in self.core.sessions
        claims = self.claims()
        assert claims == {name: len(groups) for name, groups in self._of.items()}
        for name, count in claims.items():
            assert self.core.shards.claims(*name) >= count
