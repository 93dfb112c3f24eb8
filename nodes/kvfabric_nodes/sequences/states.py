"""States: versioned heads, changed by compare-and-swap, over immutable shards.

A head's shard stays as long as it is the head. One that was head stays while somebody
leases, pins or claims it: a snapshot. Versions of a node only grow, so that a head which
was removed and made anew never looks like the old one.

A head goes to another node in three steps, and at each of them one node at most answers for
it: it is frozen here and answers nobody; the other node adopts it, and answers nobody either;
it leaves here, which the other one learns by asking. Until it has left it may thaw, and what
was adopted is discarded. Who asks is told for how long it stays frozen, so that a source that
dies within that time leaves the head to who has adopted it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from kvfabric.errors import Conflict, Refused, Retry
from kvfabric.rpc.v1 import control_pb2
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


@dataclass(frozen=True, slots=True)
class Offer:
    """A frozen head that another node is asked to adopt."""

    number: int
    head: Head
    until_s: float  # frozen until then at least


@dataclass(frozen=True, slots=True)
class Left:
    """Where a head went, by which offer."""

    node: str
    offer: int


@dataclass(slots=True, eq=False)
class Adopted:
    """A head whose source has not let go of it yet, as far as is known."""

    head: Head
    source: str
    offer: int
    frozen_until_s: float = -math.inf  # there, at least


@dataclass(frozen=True, slots=True)
class Said:
    """What the source of an adopted head says of it."""

    offer: int = 0  # under which it is frozen, or went to `node`
    node: str = ""
    frozen_s: float = 0.0  # for so long from now on at least
    ended: bool = False  # it says nothing: its process is no more


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
        self.frozen: dict[Name, Offer] = {}
        self.adopted: dict[Name, Adopted] = {}
        self.left: dict[Name, Left] = {}  # the latest of those that went elsewhere
        self._changed: dict[Name, None] = {}  # since the last report
        self._snapshots: dict[Shard, None] = {}  # were heads, and somebody still needs them
        self._next_version = first_version
        self._first_version = first_version
        self._next_offer = first_version
        self._began_s = began_s

    def read(self, session: Session, namespace: NamespaceId, name: bytes) -> Head:
        """Retry while it is on its way to or from another node."""
        self.core.admit(session, namespace, 1)
        if (namespace, name) in self.frozen or (namespace, name) in self.adopted:
            raise Retry(f"state {name.hex()[:16]} is being moved; come again in a moment")
        return self._head(namespace, name)

    def _head(self, namespace: NamespaceId, name: bytes) -> Head:
        return self.heads.get(namespace, {}).get(name, NO_HEAD)

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
                self._admit_another(namespace)
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

    def _admit_another(self, namespace: NamespaceId) -> None:
        if self.count + len(self.adopted) >= self.limits.states:
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
            self._changed[namespace, name] = None
            self.left.pop((namespace, name), None)
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

    # To other nodes, and from them

    def freeze(self, name: Name, until_s: float) -> Offer | None:
        """Nobody is answered until it thaws or leaves. None: there is none to be offered."""
        head = self._head(*name)
        if not head.version or name in self.frozen:
            return None
        self.frozen[name] = offer = Offer(self._next_offer, head, until_s)
        self._next_offer += 1
        return offer

    def thaw(self, name: Name) -> None:
        """No other node has got it by this offer, or will."""
        del self.frozen[name]

    def leave(self, name: Name, node: str, now_s: float) -> None:
        """A frozen head is the other node's from now on."""
        offer = self.frozen.pop(name)
        self._set(*name, offer.head, NO_HEAD)
        self.left[name] = Left(node, offer.number)
        if len(self.left) > self.limits.states:
            del self.left[next(iter(self.left))]
        self.core.end_of_claim(name[0], offer.head.key, now_s)
        self._retire(name[0], offer.head.key, now_s)

    def adopt(self, name: Name, head: Head, source: str, offer: int, now_s: float) -> Adopted:
        """Another node's head, which answers nobody before it is settled. Safe to repeat.

        Conflict where this node has one of this name.
        """
        self.check_adoptable(name, source, offer)
        known = self.adopted.get(name)
        if known is not None and known.offer == offer:
            return known
        self.discard(name, now_s)
        self._admit_another(name[0])
        self.adopted[name] = adopted = Adopted(head, source, offer)
        self.core.shards.claim(name[0], head.key)
        self._changed[name] = None
        return adopted

    def check_adoptable(self, name: Name, source: str, offer: int) -> None:
        """Conflict where a head of this name is here, or offered by another, or offered anew."""
        known = self.adopted.get(name)
        if self._head(*name).version or (
            known is not None and (known.source != source or known.offer > offer)
        ):
            raise Conflict(f"state {name[1].hex()[:16]} is on this node already")

    def hear(
        self, name: Name, adopted: Adopted, said: Said, me: str, asked_s: float, now_s: float
    ) -> bool:
        """The source was asked whose the head is; whether that is known now."""
        if self.adopted.get(name) is not adopted:
            return True
        same = said.offer == adopted.offer
        if same and said.frozen_s:
            adopted.frozen_until_s = asked_s + said.frozen_s
            return False
        if (same and said.node == me) or (said.ended and now_s < adopted.frozen_until_s):
            self._settle(name)
        else:
            self.discard(name, now_s)
        return True

    def _settle(self, name: Name) -> None:
        """The source has let go of what was adopted: it is this node's head."""
        head = self.adopted.pop(name).head
        self._next_version = max(self._next_version, head.version + 1)
        self._set(*name, NO_HEAD, head)

    def discard(self, name: Name, now_s: float) -> None:
        """What was adopted, if anything, stays its source's."""
        adopted = self.adopted.pop(name, None)
        if adopted is not None:
            self._changed[name] = None
            self.core.end_of_claim(name[0], adopted.head.key, now_s)

    def names(self) -> list[Name]:
        """Of all heads."""
        return [(namespace, name) for namespace, room in self.heads.items() for name in room]

    def report(self, *, full: bool) -> list[control_pb2.Heads]:
        """What changed since the last report; `full`: all there is to tell."""
        names = {*self.names(), *self.adopted, *self.left} if full else self._changed
        fates: dict[tuple[NamespaceId, bool, str], list[bytes]] = {}
        for namespace, name in sorted(names):
            here = (namespace, name) in self.adopted or name in self.heads.get(namespace, ())
            left = None if here else self.left.get((namespace, name))
            fate = (namespace, not here, left.node if left else "")
            fates.setdefault(fate, []).append(name)
        self._changed = {}
        return [
            control_pb2.Heads(namespace_id=namespace, names=b"".join(alike), gone=gone, node=node)
            for (namespace, gone, node), alike in fates.items()
        ]

    # Time, and what others claim

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
        """How many heads claim each key, adopted ones too."""
        own = Counter(
            (namespace, head.key)
            for namespace, room in self.heads.items()
            for head in room.values()
        )
        own.update((name[0], adopted.head.key) for name, adopted in self.adopted.items())
        return own

    def check(self) -> None:
        """Asserts that heads are counted and their keys claimed."""
        assert self.count == sum(map(len, self.heads.values()))
        assert all(self.heads.values())
        versions = [head.version for room in self.heads.values() for head in room.values()]
        assert all(0 < version < self._next_version for version in versions)
        names = set(self.names())
        assert all(self._head(*name) == offer.head for name, offer in self.frozen.items())
        assert not names & self.adopted.keys()
        assert not names & self.left.keys()
        for name, count in self.claims().items():
            assert self.core.shards.claims(*name) >= count
