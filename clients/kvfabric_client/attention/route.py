"""Who is asked for which tokens of one context. Pure: it decides, and nothing else.

Every block is asked of one node: of its home, unless the route names another. So every token is
asked of exactly one node, whatever else has it too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvfabric.attention.masks import within
from kvfabric.types import Key
from kvfabric_client.attention.runs import Runs, joined, without

HOME = ""  # as an address


class Block(Protocol):
    """A sealed block of a context."""

    @property
    def key(self) -> Key: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


@dataclass(slots=True)
class Route:
    """Which blocks, by their number, lie elsewhere, as far as is known."""

    places: dict[int, tuple[Key, str]] = field(default_factory=dict)  # the block, and its address
    _runs: dict[str, Runs] | None = None  # by address; None: to be made again

    def assign(self, index: int, key: Key, address: str) -> None:
        """From now on this block is asked of the node at `address`."""
        if self.places.get(index) == (key, address):
            return
        if address != HOME:
            self.places[index] = (key, address)
            self._runs = None
        elif self.places.pop(index, None):
            self._runs = None

    def recheck(self, blocks: Sequence[Block]) -> None:
        """After a cut: forgets what is said of blocks that are others now, or none."""
        for index, (key, _) in list(self.places.items()):
            if index >= len(blocks) or blocks[index].key != key:
                del self.places[index]
                self._runs = None

    def plan(self, wanted: Runs, blocks: Sequence[Block]) -> dict[str, Runs]:
        """Who is asked for what of the tokens that are wanted, by address."""
        if self._runs is None:
            self._runs = _runs_of(self.places, blocks)
        asked: dict[str, Runs] = {}
        for address, runs in self._runs.items():
            if here := within(wanted, runs):
                asked[address] = here
                wanted = without(wanted, here)
        if wanted:
            asked[HOME] = wanted
        return asked

    def at(self, address: str) -> list[int]:
        """The blocks, by their numbers, that are asked of this node."""
        return sorted(index for index, (_, place) in self.places.items() if place == address)


def touched(blocks: Sequence[Block], runs: Iterable[tuple[int, int]]) -> list[int]:
    """The numbers of the blocks, ascending by position, that have some of these tokens."""
    found: list[int] = []
    for first, end in runs:
        index = bisect_right(blocks, first, key=lambda block: block.end)
        while index < len(blocks) and blocks[index].start < end:
            if not found or found[-1] < index:
                found.append(index)
            index += 1
    return found


def _runs_of(places: Mapping[int, tuple[Key, str]], blocks: Sequence[Block]) -> dict[str, Runs]:
    runs: dict[str, Runs] = {}
    for index, (_, address) in places.items():
        runs.setdefault(address, []).append((blocks[index].start, blocks[index].end))
    return {address: joined(mine) for address, mine in runs.items()}
