"""Blocks that lie at other nodes are claimed there, in place, so that they are not mere cache.

For a sequence that begins with blocks of others, and for lent blocks whose loan has ended.
The manager says where they lie; a loan whose source is its creditor moves no bytes. Nobody
waits for it: a block that cannot be claimed is read as long as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvfabric.lending.loans import LoanState
from kvfabric.rpc.v1 import types_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.lending.borrowing import RECLAIM_S, Borrower
from kvfabric_nodes.lending.debt_book import DEBTS, DebtBook
from kvfabric_nodes.lending.debts import INFINITY, Batch, Debt, Place, Stage
from kvfabric_nodes.lending.post import Post
from kvfabric_nodes.lending.seeking import LOAN_KEYS
from kvfabric_nodes.lending.terms import Identity
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import slot_bytes
from kvfabric_nodes.store.shards import Shard

WANTED_KEYS = LOAN_KEYS * DEBTS  # at a time
ASKED = 4  # questions and claims that wait for an answer, at a time
GAP_S = 0.05  # until one of them is looked at again
REST_FIRST_S = 0.5  # before a search looks again for what it did not get
REST_MOST_S = 5.0

Replicas = Sequence[Mapping[str, types_pb2.Endpoints]]  # of each key: nodes, best first


class Kind(NamedTuple):
    """What the blocks of one loan have in common."""

    namespace: NamespaceId
    tenant: str
    layers: int
    size_bytes: int


@dataclass(slots=True, eq=False)
class Search:
    """A few like blocks that are to be claimed wherever they are."""

    kind: Kind
    why: str
    was_lent: bool  # else a sequence began with them
    wake: Callable[[], None]
    keys: dict[Key, None] = field(default_factory=dict)
    end_s: float = INFINITY  # known from its first look on
    next_s: float = 0.0  # when to look again
    wait_s: float = REST_FIRST_S
    asking: bool = False
    refusals: dict[str, str] = field(default_factory=dict)  # why these nodes do not lend
    reason: str = "it does not answer"  # the last of them
    told: bool = False  # the manager has said where its blocks are
    shown: set[Key] = field(default_factory=set)  # another node has these, as last heard

    def refused(self, node: str, why: str, owes: bool) -> None:
        """Another node may have some, too."""
        self.refusals[node] = self.reason = why
        self.next_s = 0.0
        self.wake()

    def has_others(self, node: str) -> bool:
        return False

    def rest(self, now_s: float) -> None:
        self.next_s = min(now_s + self.wait_s, self.end_s)
        self.wait_s = min(REST_MOST_S, 2 * self.wait_s)


class Claimer:
    """See the module. `run` is called after every event."""

    def __init__(
        self, core: NodeCore, me: Identity, post: Post, book: DebtBook, borrower: Borrower
    ) -> None:
        self.next_s = INFINITY
        self._core = core
        self._me = me
        self._post = post
        self._book = book
        self._borrower = borrower
        self._searches: dict[Search, None] = {}  # oldest first
        self._growing: dict[tuple[Kind, bool], Search] = {}  # those that nobody has looked at yet
        self._wanted: set[Place] = set()  # the keys of all of them
        borrower.on_lost = self._lost
        core.on_dropped.append(self._dropped)

    def claim(self, kind: Kind, keys: Iterable[Key], why: str, now_s: float) -> None:
        """These keys, as far as they are neither here nor lent."""
        for key in keys:
            if self._stray((kind.namespace, key)):
                self._want(kind, key, why, now_s, was_lent=False)

    def run(self, now_s: float) -> None:
        """Does what is due, a little at a time."""
        if now_s < self.next_s:
            return
        free = ASKED - self._in_flight()
        self.next_s = INFINITY
        for search in list(self._searches):
            if search.asking:
                continue
            if search.next_s <= now_s:
                if free <= 0:
                    self.next_s = min(self.next_s, now_s + GAP_S)
                    break
                free -= self._look(search, now_s)
            if search in self._searches and not search.asking:
                self.next_s = min(self.next_s, search.next_s)

    def check(self) -> None:
        """Asserts all invariants."""
        wanted = [(s.kind.namespace, key) for s in self._searches for key in s.keys]
        assert len(wanted) == len(self._wanted) <= WANTED_KEYS
        assert set(wanted) == self._wanted
        assert all(0 < len(search.keys) <= LOAN_KEYS for search in self._searches)
        assert all(search in self._searches for search in self._growing.values())
        assert self.next_s < INFINITY or all(search.asking for search in self._searches)

    # One search's steps -----------------------------------------------------------------

    def _want(self, kind: Kind, key: Key, why: str, now_s: float, *, was_lent: bool) -> None:
        place = (kind.namespace, key)
        if place in self._wanted:
            return
        if len(self._wanted) >= WANTED_KEYS:
            why = f"{WANTED_KEYS} blocks are being looked for already"
            self._core.story.note(now_s, *place, "lost" if was_lent else "not claimed", why)
            return
        search = self._growing.get((kind, was_lent))
        if search is None or len(search.keys) >= LOAN_KEYS:
            search = Search(kind, why, was_lent, self._wake)
            self._searches[search] = None
            self._growing[kind, was_lent] = search
        search.keys[key] = None
        self._wanted.add(place)
        self._wake()

    def _look(self, search: Search, now_s: float) -> bool:
        """Whether it asks where its blocks are."""
        name = (search.kind, search.was_lent)
        if self._growing.get(name) is search:
            del self._growing[name]
        search.end_s = min(search.end_s, now_s + RECLAIM_S)
        for key in [key for key in search.keys if self._settled((search.kind.namespace, key))]:
            self._forget(search, key)
        if now_s >= search.end_s:
            self._give_up(search, now_s)
            return False
        keys = [key for key in search.keys if self._open((search.kind.namespace, key))]
        if not keys:
            search.rest(now_s)
            return False

        def then(answer: Replicas | None, why: str, at_s: float) -> None:
            search.asking = False
            search.told = search.told or answer is not None
            if search in self._searches:
                self._found(search, dict(zip(keys, answer or (), strict=False)), at_s)

        search.asking = True
        self._post.replicas(search.kind.namespace, keys, then, now_s)
        return True

    def _found(
        self,
        search: Search,
        replicas: Mapping[Key, Mapping[str, types_pb2.Endpoints]],
        now_s: float,
    ) -> None:
        """Claims each key where it is, but not where it was refused or nobody answers."""
        chosen: dict[str, list[Key]] = {}
        endpoints: dict[str, types_pb2.Endpoints] = {}
        for key, nodes in replicas.items():
            place = (search.kind.namespace, key)
            if not self._open(place):
                continue
            if nodes.keys() - {self._me.node}:
                search.shown.add(key)
            else:
                search.shown.discard(key)
            silent = self._book.going.get(place)
            barred = {self._me.node, *search.refusals, *([silent.creditor] if silent else ())}
            node = next((node for node in nodes if node not in barred), None)
            if node is not None and len(self._book.debts) + len(chosen) < DEBTS:
                chosen.setdefault(node, []).append(key)
                endpoints[node] = nodes[node]
                if silent is not None:
                    self._book.leave(silent, key, now_s, drop=False)
        for node, keys in chosen.items():
            kind = search.kind
            slot = slot_bytes(kind.size_bytes)
            batch = Batch(*kind, slot, keys, node, endpoints[node])
            self._borrower.borrow(batch, node, endpoints[node], search.why, now_s, search)
        if not chosen:
            search.refusals.clear()  # they are asked again, later
        search.rest(now_s)
        self._wake()  # another search has its turn

    def _give_up(self, search: Search, now_s: float) -> None:
        """What is left of it stays what it is: cache elsewhere, or missing."""
        namespace, story = search.kind.namespace, self._core.story
        for key in list(search.keys):
            if key in search.shown:
                story.note(now_s, namespace, key, "not claimed", search.reason)
            elif search.was_lent:
                why = "no other node has it" if search.told else "nobody says where it may be"
                story.note(now_s, namespace, key, "lost", why)
            self._forget(search, key)

    def _forget(self, search: Search, key: Key) -> None:
        del search.keys[key]
        self._wanted.discard((search.kind.namespace, key))
        if not search.keys:
            self._searches.pop(search, None)

    # Questions --------------------------------------------------------------------------

    def _in_flight(self) -> int:
        """What waits for an answer, without who is known to be silent."""
        asked = sum(
            1
            for debt in self._book.debts.values()
            if debt.reclaims and debt.state is LoanState.REQUESTED and not debt.unanswered
        )
        return asked + sum(search.asking for search in self._searches)

    def _stray(self, place: Place) -> bool:
        """Needed here, but neither here nor lent, nor on its way to be."""
        lent = place in self._book.away or place in self._book.going
        return not lent and self._core.shards.get(*place) is None

    def _settled(self, place: Place) -> bool:
        """Nothing is to be done for it any more."""
        shards = self._core.shards
        here = shards.get(*place) is not None
        return here or place in self._book.away or not shards.claims(*place)

    def _open(self, place: Place) -> bool:
        """Whether it is asked of nobody, or of one who does not answer."""
        debt = self._book.going.get(place)
        if debt is None:
            return not self._settled(place)
        silent = debt.reclaims and debt.unanswered > 0
        return silent and debt.stages[place[1]] is Stage.ASKED

    # Events -----------------------------------------------------------------------------

    def _wake(self) -> None:
        self.next_s = 0.0

    def _lost(self, debt: Debt, key: Key, why: str, now_s: float) -> None:
        """A loan of this key has ended, and nobody is known to have it."""
        batch = debt.batch
        kind = Kind(batch.namespace, batch.tenant, batch.layers, batch.size_bytes)
        why = f"a replica is there ({debt.creditor}: {why})"
        self._want(kind, key, why, now_s, was_lent=True)

    def _dropped(self, shard: Shard, what: str, now_s: float) -> None:
        """What is needed and was found to be damaged here may lie elsewhere."""
        place = (shard.namespace, shard.key)
        if what != "purged" and self._core.shards.claims(*place) and self._stray(place):
            kind = Kind(shard.namespace, shard.pool[0], shard.layers or 1, shard.size_bytes)
            self._want(
                kind,
                shard.key,
                f"a replica is there (the one here was {what})",
                now_s,
                was_lent=True,
            )
