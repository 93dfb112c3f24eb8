"""States: versioned heads, changed by compare-and-swap, over immutable shards.

A head's shard stays as long as it is the head. One that was head stays while somebody
leases, pins or claims it: a snapshot. Versions of a node only grow, so that a head which
was removed and made anew never looks like the old one.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from kvfabric.errors import Refused, Retry
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.store.core import NO_KEY, NodeCore
from kvfabric_nodes.store.promises import Session
from kvfabric_nodes.store.shards import Shard

Name = tuple[NamespaceId, bytes]


@dataclass(frozen=True, slots=True)
class StateLimits:
    """Every limit of states, by name."""

    states: int = 65536  # on a node
    states_of_namespace: int = 16384
    snapshots: int = 4096  # that readers keep; older ones are left to eviction


@dataclass(frozen=True, slots=True)
class Head:
    """What a state is now. Version 0: there is none."""

    version: int = 0
    key: Key = NO_KEY


NO_HEAD = Head()


class States:
    """See the module. `first_version`: as with sequences, no number is ever given twice.

    Where that is the time in ns of `began_s`, a state that is made has a greater version than
    any that was made before at another node, as far as their clocks agree.
    """

    def __init__(
        self,
        core: NodeCore,
        limits: StateLimits | None = None,
        first_version: int = 1,
        began_s: float = math.inf,
    ) -> None:
        self.core = core
        self.limits = limits or StateLimits()
        self.heads: dict[NamespaceId, dict[bytes, Head]] = {}
        self.count = 0
        self.moving: set[Name] = set()  # on their way: nobody is answered, see handovers.py
        self.changed: dict[Name, None] = {}  # that came or went since the last report
        self._snapshots: dict[Shard, None] = {}  # were heads, and somebody still needs them
        self._next_version = first_version
        self._first_version = first_version
        self._began_s = began_s

    def read(self, session: Session, namespace: NamespaceId, name: bytes) -> Head:
        """Retry while it is on its way to or from another node."""
        self.core.admit(session, namespace, 1)
        if (namespace, name) in self.moving:
            raise Retry(f"state {name.hex()[:16]} is being moved; come again in a moment")
        return self.head((namespace, name))

    def head(self, name: Name) -> Head:
        """Also of one that answers nobody."""
        return self.heads.get(name[0], {}).get(name[1], NO_HEAD)

    def swap(
        self,
        session: Session,
        namespace: NamespaceId,
        name: bytes,
        expected_version: int,
        key: Key,
        now_s: float,
    ) -> tuple[bool, Head]:
        """Whether the head was at `expected_version` and is `key` now; the head as it is now.

        An empty key removes the state.
        """
        self.core.admit(session, namespace, 1)
        old = self.read(session, namespace, name)
        if old.version != expected_version:
            return False, old
        if not key:
            new = NO_HEAD
        else:
            if self.core.shards.get(namespace, key) is None:
                raise Refused(
                    f"no shard {key.hex()[:16]} here: write it to this node before it becomes "
                    "a head"
                )
            if not old.version:
                self.admit_another(namespace)
                since_ns = int(max(0.0, now_s - self._began_s) * 1e9)
                self._next_version = max(self._next_version, self._first_version + since_ns)
            new = Head(self._next_version, key)
            self._next_version += 1
            self.core.shards.claim(namespace, key)
        self._set(namespace, name, old, new)
        if old.version:
            self.core.end_of_claim(namespace, old.key, now_s)
            self._retire(namespace, old.key, now_s)
        return True, new

    def admit_another(self, namespace: NamespaceId, coming: int = 0) -> None:
        """Retry, or Refused, where there are too many. `coming`: those that others hand over."""
        if self.count + coming >= self.limits.states:
            raise Retry(f"{self.count} states are on this node; remove some, or use another node")
        if len(self.heads.get(namespace, ())) >= self.limits.states_of_namespace:
            raise Refused(
                f"a namespace has at most {self.limits.states_of_namespace} states on a node; "
                "remove some"
            )

    def _set(self, namespace: NamespaceId, name: bytes, old: Head, new: Head) -> None:
        room = self.heads.setdefault(namespace, {})
        self.count += bool(new.version) - bool(old.version)
        if bool(new.version) != bool(old.version):
            self.changed[namespace, name] = None
        if new.version:
            room[name] = new
        else:
            room.pop(name, None)
        if not room:
            del self.heads[namespace]

    def _retire(self, namespace: NamespaceId, key: Key, now_s: float) -> None:
        """No head points to this shard by the swapped name any more."""
        shard = self.core.shards.get(namespace, key)
        if shard is None or self._over(shard, now_s):
            return
        self._snapshots[shard] = None
        while len(self._snapshots) > self.limits.snapshots:
            del self._snapshots[next(iter(self._snapshots))]

    def give(self, name: Name, now_s: float) -> None:
        """The head is another node's from now on."""
        head = self.head(name)
        self._set(*name, head, NO_HEAD)
        self.core.end_of_claim(name[0], head.key, now_s)
        self._retire(name[0], head.key, now_s)

    def take(self, name: Name, head: Head) -> None:
        """Another node's head is this node's from now on. Its key is claimed already."""
        self._next_version = max(self._next_version, head.version + 1)
        self._set(*name, NO_HEAD, head)

    def names(self) -> list[Name]:
        """Of all heads."""
        return [(namespace, name) for namespace, room in self.heads.items() for name in room]

    def tick(self, now_s: float) -> None:
        """Frees the snapshots that nobody needs any more."""
        for shard in list(self._snapshots):
            if self._over(shard, now_s):
                del self._snapshots[shard]

    def _over(self, shard: Shard, now_s: float) -> bool:
        """Drops it, unless somebody needs it."""
        if not shard.present:
            return True
        if shard.extent.holders or shard.pinned or self.core.shards.claimed(shard):
            return False
        self.core.drop(shard, "dropped", "its state went on", now_s)
        return True

    def claims(self) -> Counter[tuple[NamespaceId, Key]]:
        """How many heads claim each key."""
        return Counter(
            (namespace, head.key)
            for namespace, room in self.heads.items()
            for head in room.values()
        )

    def check(self) -> None:
        """Asserts that heads are counted and their keys claimed."""
        assert self.count == sum(map(len, self.heads.values()))
        assert all(self.heads.values())
        versions = [head.version for room in self.heads.values() for head in room.values()]
        assert all(0 < version < self._next_version for version in versions)
        for name, count in self.claims().items():
            assert self.core.shards.claims(*name) >= count
