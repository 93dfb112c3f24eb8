"""One context at all the nodes that have some of it: who is asked for what, by which spans."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from kvfabric.errors import FabricError, Unsupported
from kvfabric_client.attention.route import HOME, Block, Route, touched
from kvfabric_client.attention.runs import Runs, without
from kvfabric_client.attention.spans import Span, close
from kvfabric_client.blocks import Array, BlockShape
from kvfabric_client.deadline import Deadline
from kvfabric_client.link import Link

if TYPE_CHECKING:
    from kvfabric_client.client import Client
    from kvfabric_client.room import Room


class Source(Protocol):
    """What a context is made of: a sequence, or a bank of shards."""

    @property
    def room(self) -> Room: ...
    @property
    def shape(self) -> BlockShape: ...
    @property
    def blocks(self) -> Sequence[Block]:
        """The sealed ones, by ascending position."""

    @property
    def home(self) -> str:
        """The address of the node that is asked for what is not known to lie elsewhere."""

    @property
    def sequence(self) -> int:
        """Its number there. 0: it is none."""

    def take_cut(self) -> bool:
        """Whether some blocks are not those that they were when it was asked last."""

    def opened(
        self, runs: Runs, layer: int, patience: Callable[[], Deadline]
    ) -> Iterator[tuple[int, Array]]:
        """What of these tokens is in open blocks: first tokens, and copies of the blocks'
        numbers, [planes, heads, tokens, dim]. `patience`: for each."""

    def named(self, indices: Sequence[int], deadline: Deadline) -> list[str | None]:
        """Per block the address of the node that the home names for it; None: it knows none."""


class Context:
    """See the module. For one thread at a time; a sequence's lock sees to that."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.route = Route()
        self._known = False
        self._spans: dict[tuple[str, int], Span] = {}
        self._mute: weakref.WeakKeyDictionary[Link, str] = weakref.WeakKeyDictionary()

    @property
    def client(self) -> Client:
        return self.source.room.client

    def begin(self, deadline: Deadline) -> None:
        """Before each call: looks where everything lies the first time, and after a cut what of
        that still stands."""
        blocks = self.source.blocks
        cut = self.source.take_cut()
        if not self._known:
            self._known = True
            self._look(deadline)
        elif cut:
            self.route.recheck(blocks)
            keys = {block.start: block.key for block in blocks}
            self._drop([at for at, span in self._spans.items() if span.holds_others(keys)])

    def _look(self, deadline: Deadline) -> None:
        blocks = self.source.blocks
        if blocks:
            for index, place in enumerate(self.source.named(range(len(blocks)), deadline)):
                self.route.assign(index, blocks[index].key, place or HOME)

    def plan(self, wanted: Runs) -> dict[str, Runs]:
        """Who is asked for what of these tokens, by place: an address, or HOME."""
        return self.route.plan(wanted, self.source.blocks)

    def address(self, place: str) -> str:
        return place if place != HOME else self.source.home

    def span(self, place: str, link: Link, value_dim: int, runs: Runs, deadline: Deadline) -> Span:
        """The span that has these tokens at a node. Unsupported where it computes nothing."""
        source = self.source
        if link in self._mute:
            raise Unsupported(self._mute[link])
        sequence = source.sequence if place == HOME else 0
        span = self._spans.get((place, value_dim))
        if span is None or span.link is not link or span.sequence != sequence:
            self._drop([(place, value_dim)])
            room = source.room
            link.open(room.namespace, room.id, deadline.at_s)
            span = Span(link, room.id, source.shape, value_dim, sequence)
        missing = [] if sequence else without(runs, span.runs)
        if missing or not span.id:
            self._spans[place, value_dim] = span
            try:
                span.ensure([source.blocks[i] for i in touched(source.blocks, missing)], deadline)
            except FabricError as error:
                self._drop([(place, value_dim)])  # the node may have extended it all the same
                if isinstance(error, Unsupported):
                    self._mute[link] = str(error)  # as long as this session lasts
                raise
        return span

    def forget(self, place: str) -> None:
        """A node did not know its spans any more, or not as they are here."""
        self._drop([at for at in self._spans if at[0] == place])

    def close(self) -> None:
        """The nodes may forget it. Safe to repeat."""
        self._drop(list(self._spans))

    def _drop(self, which: Iterable[tuple[str, int]]) -> None:
        close([self._spans.pop(at) for at in which if at in self._spans])


class Search:
    """Where the blocks of one context are looked for that were not where they should be, during
    one call: where the home says they are, then where the directory does, then both again."""

    PASSES = 2

    def __init__(self, context: Context) -> None:
        self.context = context
        self._tried: dict[int, set[str]] = {}  # addresses, by block
        self._passes: dict[int, int] = {}
        self._tails = 0  # how often open tokens were asked for in vain

    def missed(self, place: str, runs: Iterable[tuple[int, int]]) -> None:
        """A node does not have these tokens, or does not answer."""
        address = self.context.address(place)
        for index in touched(self.context.source.blocks, runs):
            self._tried.setdefault(index, set()).add(address)

    def go_on(self, runs: Runs, deadline: Deadline) -> Runs:
        """Routes tokens that were missed to where they are asked for next; answers those for
        which no place is left."""
        source, route = self.context.source, self.context.route
        blocks = source.blocks
        lost = self._open(runs)
        rest = touched(blocks, runs)
        for ask in (self._named, self._elsewhere, self._named):
            places = ask(rest, deadline) if rest else []
            for index, place in zip(rest, places, strict=True):
                if place is not None:
                    route.assign(index, blocks[index].key, place)
            rest = [i for i, place in zip(rest, places, strict=True) if place is None]
            if ask == self._elsewhere:
                self._again(rest)
        for index in rest:
            route.assign(index, blocks[index].key, HOME)
            lost.append((blocks[index].start, blocks[index].end))
        return lost

    def _open(self, runs: Runs) -> Runs:
        """Open tokens are at home or nowhere."""
        blocks = self.context.source.blocks
        opened = without(runs, [(block.start, block.end) for block in blocks])
        self._tails += bool(opened)
        return opened if self._tails >= self.PASSES else []

    def _again(self, indices: Sequence[int]) -> None:
        """A block that moves while it is looked for may be where it was not before."""
        for index in indices:
            self._passes[index] = self._passes.get(index, 1) + 1
            if self._passes[index] <= self.PASSES:
                self._tried[index] = set()

    def _named(self, indices: Sequence[int], deadline: Deadline) -> list[str | None]:
        places = self.context.source.named(indices, deadline)
        return [
            place if place is not None and self._may(index, self.context.address(place)) else None
            for index, place in zip(indices, places, strict=True)
        ]

    def _elsewhere(self, indices: Sequence[int], deadline: Deadline) -> list[str | None]:
        source, client = self.context.source, self.context.client
        keys = [source.blocks[index].key for index in indices]
        vain = [self._tried.get(index, set()) | client.hanging() for index in indices]
        places: list[str | None] = [None] * len(indices)
        for address, found in client.elsewhere(source.room.id, keys, deadline, vain).items():
            for position in found:
                places[position] = address
        return places

    def _may(self, index: int, address: str) -> bool:
        client = self.context.client
        return address not in self._tried.get(index, ()) and address not in client.hanging()
