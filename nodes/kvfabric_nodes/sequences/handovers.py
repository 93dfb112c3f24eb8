"""Heads of states on their way to other nodes, and from them.

A head goes in three steps, and at each of them one node at most answers for it: it is frozen
here and answers nobody; the other node adopts it, and answers nobody either; it leaves here,
which the other one learns by asking. Until it has left it may thaw, and what was adopted is
discarded. Who asks is told for how long it stays frozen, so that a source that dies within
that time leaves the head to who has adopted it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from kvfabric.errors import Conflict
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.sequences.states import Head, Name, States


@dataclass(frozen=True, slots=True)
class Offer:
    """A frozen head that another node is asked to adopt."""

    number: int
    head: Head
    until_s: float  # frozen until then at least


@dataclass(frozen=True, slots=True)
class Left:
    """Where a head went, by which offer, and when."""

    node: str
    offer: int
    at_s: float


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


class Handovers:
    """See the module. `first_offer`: no number is ever given twice."""

    def __init__(self, states: States, first_offer: int = 1) -> None:
        self.states = states
        self.frozen: dict[Name, Offer] = {}
        self.adopted: dict[Name, Adopted] = {}
        self.left: dict[Name, Left] = {}  # the latest of those that went elsewhere
        self._core = states.core
        self._next_offer = first_offer

    def freeze(self, name: Name, until_s: float) -> Offer | None:
        """Nobody is answered until it thaws or leaves. None: there is none to be offered."""
        head = self.states.head(name)
        if not head.version or name in self.frozen:
            return None
        self.frozen[name] = offer = Offer(self._next_offer, head, until_s)
        self._next_offer += 1
        self.states.moving.add(name)
        return offer

    def thaw(self, name: Name) -> None:
        """No other node has got it by this offer, or will."""
        del self.frozen[name]
        self.states.moving.remove(name)

    def leave(self, name: Name, node: str, now_s: float) -> None:
        """A frozen head is the other node's from now on."""
        offer = self.frozen.pop(name)
        self.states.moving.remove(name)
        self.states.give(name, now_s)
        self.left.pop(name, None)
        self.left[name] = Left(node, offer.number, now_s)
        if len(self.left) > self.states.limits.states:
            del self.left[next(iter(self.left))]

    def adopt(self, name: Name, head: Head, source: str, offer: int, now_s: float) -> Adopted:
        """Another node's head, which answers nobody before it is settled. Safe to repeat.

        Conflict where this node has one of this name.
        """
        self.check_adoptable(name, source, offer)
        known = self.adopted.get(name)
        if known is not None and known.offer == offer:
            return known
        self.discard(name, now_s)
        self.states.admit_another(name[0], len(self.adopted))
        self.adopted[name] = adopted = Adopted(head, source, offer)
        self.states.moving.add(name)
        self._core.shards.claim(name[0], head.key)
        self.states.changed[name] = None
        return adopted

    def check_adoptable(self, name: Name, source: str, offer: int) -> None:
        """Conflict where a head of this name is here, or offered by another, or offered anew."""
        known = self.adopted.get(name)
        if self.states.head(name).version or (
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
        self.states.moving.remove(name)
        self.states.take(name, self.adopted.pop(name).head)

    def give_up(self, name: Name, adopted: Adopted, now_s: float) -> None:
        """Discards this, unless it is settled, or replaced by a newer offer."""
        if self.adopted.get(name) is adopted:
            self.discard(name, now_s)

    def discard(self, name: Name, now_s: float) -> None:
        """What was adopted, if anything, stays its source's."""
        adopted = self.adopted.pop(name, None)
        if adopted is not None:
            self.states.moving.remove(name)
            self.states.changed[name] = None
            self._core.end_of_claim(name[0], adopted.head.key, now_s)

    def report(self, *, full: bool) -> list[control_pb2.Heads]:
        """What changed since the last report; `full`: all there is to tell."""
        names = {*self.states.names(), *self.adopted, *self.left} if full else self.states.changed
        fates: dict[tuple[NamespaceId, bool, str], list[bytes]] = {}
        for namespace, name in sorted(names):
            here = (namespace, name) in self.adopted or self.states.head((namespace, name)).version
            if here:  # if it had left, it came back or was made anew
                self.left.pop((namespace, name), None)
            left = self.left.get((namespace, name))
            fate = (namespace, not here, left.node if left else "")
            fates.setdefault(fate, []).append(name)
        self.states.changed = {}
        return [
            control_pb2.Heads(namespace_id=namespace, names=b"".join(alike), gone=gone, node=node)
            for (namespace, gone, node), alike in fates.items()
        ]

    def claims(self) -> Counter[tuple[NamespaceId, Key]]:
        """How many adopted heads claim each key."""
        return Counter((name[0], adopted.head.key) for name, adopted in self.adopted.items())

    def check(self) -> None:
        """Asserts that what is on its way answers nobody, and its keys are claimed."""
        assert self.states.moving == {*self.frozen, *self.adopted}
        for name, offer in self.frozen.items():
            assert self.states.head(name) == offer.head
        assert not any(self.states.head(name).version for name in self.adopted)
        claims = self.states.claims() + self.claims()
        for claimed, count in claims.items():
            assert self._core.shards.claims(*claimed) >= count
