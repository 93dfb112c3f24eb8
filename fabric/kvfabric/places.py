"""The places at which keys may lie: small numbers that stand for sets of holders.

A holder is one tier of one node. When holders go, the places with them are rewritten, not
the keys there; several numbers may mean the same then, of which one is current and the
others are stale until the last key has been moved to the current one. Work is bounded by
the places that a holder has, not by all there are: with many replicas there are many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kvfabric.errors import Broken
from kvfabric.types import NodeId, Tier

NOWHERE = 0


class Replica(NamedTuple):
    """One copy: on which node, in which tier."""

    node: NodeId
    tier: Tier


Place = tuple[Replica, ...]
"""The replicas of a key, best first: fastest tier, then the node's name."""

_Holders = tuple[int, ...]  # numbers of holders, ascending


@dataclass(slots=True)
class Holder:
    """One tier of one node, under one report; `count` keys, `hash` the sum of their heads."""

    replica: Replica
    shown: bool
    count: int = 0
    hash: int = 0


class Places:
    """See the module. A place other than NOWHERE is remembered while it has keys."""

    def __init__(self) -> None:
        self.hidden = 0  # keys at places where no holder is shown
        self.holders: dict[int, Holder] = {}  # to be read; counts may be changed
        self.stale: set[int] = set()  # to be read
        self._of: dict[int, _Holders] = {NOWHERE: ()}
        self._current: dict[_Holders, int] = {(): NOWHERE}
        self._counts: dict[int, int] = {NOWHERE: 0}  # keys; nowhere stays 0
        self._by_holder: dict[int, set[int]] = {}
        self._replicas: dict[int, Place] = {}
        self._last = 0

    # Holders

    def open(self, replica: Replica, *, shown: bool) -> int:
        """A new holder without keys. Returns its number."""
        self._last += 1
        self.holders[self._last] = Holder(replica, shown)
        self._by_holder[self._last] = set()
        return self._last

    def show(self, holder: int) -> None:
        """What was hidden is a replica from now on."""
        self.holders[holder].shown = True
        for place in self._by_holder[holder]:
            self._forget_replicas(place)
            self._count_hidden(place, self._counts[place])

    def forget(self, holders: Iterable[int]) -> None:
        """These holders are gone: their places are rewritten without them."""
        gone = set(holders)
        touched = sorted({place for each in gone for place in self._by_holder[each]})
        for place in touched:
            self._forget_replicas(place)
        for each in gone:
            del self.holders[each], self._by_holder[each]
        for place in touched:
            old = self._of[place]
            if self._current.get(old) == place:
                del self._current[old]
            left = self._of[place] = tuple(each for each in old if each not in gone)
            if self._current.setdefault(left, place) == place:
                self.stale.discard(place)
            else:
                self.stale.add(place)
            self._count_hidden(place, self._counts[place])

    # Places

    def __iter__(self) -> Iterator[int]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def neighbour(self, place: int, holder: int, *, adding: bool) -> int:
        """`place` with or without `holder`; `place` itself where nothing changes.

        Who asks moves a key there, and says so by `moved`.
        """
        holders = self._of[place]
        if (holder in holders) == adding:
            return place
        if adding:
            return self._number(tuple(sorted((*holders, holder))))
        return self._number(tuple(each for each in holders if each != holder))

    def current(self, place: int) -> int:
        """The place with the same holders that keys should be at."""
        current = self._current.setdefault(self._of[place], place)
        if current == place:
            self.stale.discard(place)
        return current

    def moved(self, moves: Mapping[tuple[int, int], int]) -> int:
        """So many keys went from one place to another. Returns how many more keys there are."""
        for (_, new), count in moves.items():
            self._count(new, count)
        for (old, _), count in moves.items():
            self._count(old, -count)
        came = sum(count for (old, _), count in moves.items() if old == NOWHERE)
        return came - sum(count for (_, new), count in moves.items() if new == NOWHERE)

    def replicas(self, place: int) -> Place:
        """Those that are shown."""
        replicas = self._replicas.get(place)
        if replicas is None:
            holders = [self.holders[each] for each in self._of[place]]
            shown = [holder.replica for holder in holders if holder.shown]
            if len(shown) > 1:
                shown.sort(key=lambda each: (each.tier, each.node))
            replicas = self._replicas[place] = tuple(shown)
        return replicas

    def counts(self) -> Iterable[tuple[int, int]]:
        """(place, keys) of every place with keys."""
        return ((place, count) for place, count in self._counts.items() if count)

    def check(self, counts: Mapping[int, int], heads: Mapping[int, int]) -> None:
        """Broken unless all tables agree with what the keys say: their number per place, and
        the sum of their heads.
        """
        _require({NOWHERE: 0, **counts} == self._counts, "keys per place are miscounted")
        for number, holder in self.holders.items():
            mine = self._by_holder[number]
            found = sum(counts.get(place, 0) for place in mine)
            head = sum(heads.get(place, 0) for place in mine) % 2**64
            _require(
                (found, head) == (holder.count, holder.hash), f"{holder.replica} is miscounted"
            )
        hidden = sum(count for place, count in self.counts() if not self.replicas(place))
        _require(hidden == self.hidden, "hidden keys are miscounted")
        _require(self._of.keys() == self._counts.keys(), "a place is not counted")
        _require(self._replicas.keys() <= self._of.keys(), "replicas of a forgotten place")
        for holders, place in self._current.items():
            _require(self._of.get(place) == holders, f"place {place} has two meanings")
            _require(place not in self.stale, f"place {place} is current and stale")
        by_holder: dict[int, set[int]] = {each: set() for each in self.holders}
        for place, holders in self._of.items():
            _require(set(holders) <= set(self.holders), f"place {place} has a dead holder")
            current = self._current.get(holders) == place
            _require(current or place in self.stale, f"place {place} cannot be reached")
            for each in holders:
                by_holder[each].add(place)
        _require(by_holder == self._by_holder, "places by holder are wrong")
        _require(self.stale <= self._of.keys(), "a forgotten place is stale")

    # Inside

    def _number(self, holders: _Holders) -> int:
        place = self._current.get(holders)
        if place is None:
            self._last += 1
            place = self._current[holders] = self._last
            self._of[place] = holders
            self._counts[place] = 0
            for each in holders:
                self._by_holder[each].add(place)
        return place

    def _count(self, place: int, change: int) -> None:
        if place == NOWHERE:
            return
        self._count_hidden(place, change)
        self._counts[place] += change
        if self._counts[place]:
            return
        holders = self._of.pop(place)
        del self._counts[place]
        for each in holders:
            self._by_holder[each].discard(place)
        if self._current.get(holders) == place:
            del self._current[holders]
        self.stale.discard(place)
        self._replicas.pop(place, None)

    def _count_hidden(self, place: int, change: int) -> None:
        if place != NOWHERE and not self.replicas(place):
            self.hidden += change

    def _forget_replicas(self, place: int) -> None:
        self._count_hidden(place, -self._counts[place])
        self._replicas.pop(place, None)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Broken(f"the directory is wrong: {otherwise}; restart the manager and report this")
