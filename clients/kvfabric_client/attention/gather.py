"""Asks nodes until every token has been answered for exactly once, or is nowhere.

A round asks each node for what the route says it has. What it does not have, and all that was
asked of a node that does not answer in its part of the time, is looked for anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvfabric.attention.masks import within
from kvfabric.errors import (
    Broken,
    Conflict,
    DeadlineExceeded,
    Denied,
    FabricError,
    Refused,
    Retry,
    Unreachable,
    Unsupported,
)
from kvfabric.logs import guest_logger
from kvfabric_client.attention.again import AgainLane
from kvfabric_client.attention.answers import Traffic
from kvfabric_client.attention.context import Context, Search
from kvfabric_client.attention.fetched import fetched
from kvfabric_client.attention.operator import MAX_RUNS, Ask, Item, Operator
from kvfabric_client.attention.route import HOME
from kvfabric_client.attention.runs import Runs, joined, without
from kvfabric_client.attention.scatter import Arrived, Lane, scatter
from kvfabric_client.deadline import Deadline, milliseconds
from kvfabric_client.link import Link

log = guest_logger(__name__)

MAX_ROUNDS = 8
PATIENCE = 0.5  # of the time that is left: how long a round waits for its slowest node


def _nothing() -> None:
    """There is nothing to do meanwhile."""


@dataclass(slots=True)
class Gather:
    """One call of an operator over items of any number of contexts."""

    operator: Operator
    value_dim: int
    traffic: Traffic
    deadline: Deadline
    _searches: dict[Context, Search] = field(default_factory=dict)
    _unserved: list[Ask] = field(default_factory=list)  # at nodes that compute nothing
    _reopened: set[tuple[Item, str]] = field(default_factory=set)  # whose spans, by place, were

    def run(
        self, items: Sequence[Item], meanwhile: Callable[[], None] = _nothing
    ) -> list[tuple[Item, Runs]]:
        """Asks for all that the items want; answers what of it is nowhere, by item.

        `meanwhile` runs once, after the first messages have gone out.
        """
        lost: list[tuple[Item, Runs]] = []
        self._round(items, meanwhile)
        for _ in range(MAX_ROUNDS - 1):
            lost += self._follow([item for item in items if item.wanted])
            asking = [item for item in items if item.wanted]
            if not asking:
                return lost
            self._round(asking, _nothing)
        return lost + [(item, item.wanted) for item in items if item.wanted]

    def _round(self, items: Sequence[Item], meanwhile: Callable[[], None]) -> None:
        """Afterwards the items want what they were not answered for."""
        patience = self._patience()
        scatter(self._lanes(items, patience), patience, self.traffic, meanwhile, self._take)
        self._fetch()

    # Asking -------------------------------------------------------------------------

    def _lanes(self, items: Sequence[Item], patience: Deadline) -> list[Lane]:
        """What goes to whom. The items want nothing more then, but what could not be asked."""
        planned = [
            Ask(item, place, runs[at : at + MAX_RUNS])
            for item in items
            for place, runs in item.context.plan(item.wanted).items()
            for at in range(0, len(runs), MAX_RUNS)
        ]
        for item in items:
            item.wanted = []
        links: dict[tuple[int, str], Link] = {}
        asks: dict[Link, list[Ask]] = {}
        for ask in planned:
            try:
                link = self._link(ask, links, patience)
                ask.span = ask.item.context.span(
                    ask.place, link, self.value_dim, ask.runs, patience
                )
                asks.setdefault(link, []).append(ask)
            except Unsupported:
                self._unserved.append(ask)
            except Retry as error:
                self._missed(ask, ask.runs, error)
        return [self._lane(link, some, patience) for link, some in asks.items()]

    def _lane(self, link: Link, asks: Sequence[Ask], patience: Deadline) -> Lane:
        calls = self.operator.calls(asks, milliseconds(patience.left_s()))
        if again := self.operator.again(asks):
            return AgainLane(link, again, calls, patience, self.traffic)
        return Lane(link, self.operator.name, calls, patience)

    def _link(self, ask: Ask, links: dict[tuple[int, str], Link], patience: Deadline) -> Link:
        """`links`: those of this round, by client and address."""
        context = ask.item.context
        client, address = context.client, context.address(ask.place)
        link = links.get((id(client), address))
        if link is None:
            if ask.place != HOME and address in client.hanging():
                raise Unreachable(f"the node at {address} did not answer a moment ago")
            link = links[id(client), address] = client.at(address, lambda link: link, patience)
        return link

    # Answers ------------------------------------------------------------------------

    def _take(self, arrived: Arrived) -> None:
        if arrived.error is not None:
            self._failed(arrived, arrived.error)
            return
        asks = arrived.asks
        gaps = _gaps(asks, arrived) if arrived.answer.gaps else [[]] * len(asks)
        self.operator.take(asks, arrived.answer, arrived.link.node, gaps)
        for ask, runs in zip(asks, gaps, strict=True):
            if runs:
                self._missed(ask, runs)

    def _failed(self, arrived: Arrived, error: FabricError) -> None:
        """A node that is overloaded or has gone does not have what it was asked for; one that
        refuses may have lost its spans, with a restart say: these are opened again, once."""
        if isinstance(error, Retry):
            for ask in arrived.asks:
                self._missed(ask, ask.runs, error)
            return
        asked = {(ask.item, ask.place) for ask in arrived.asks}
        final = isinstance(error, (Denied, Unsupported)) or asked & self._reopened
        if final or not isinstance(error, (Refused, Conflict)):
            raise error
        self._reopened |= asked
        log.debug("spans_reopened", node=arrived.link.node, why=str(error))
        for ask in arrived.asks:
            ask.item.context.forget(ask.place)
            ask.item.wanted = joined([*ask.item.wanted, *ask.runs])

    def _missed(self, ask: Ask, runs: Runs, error: FabricError | None = None) -> None:
        context = ask.item.context
        address = context.address(ask.place)
        if isinstance(error, DeadlineExceeded):
            context.client.hangs(address)
        if error is not None:
            log.debug("not_attended", address=address, why=str(error), effect="sought elsewhere")
        self._search(ask.item.context).missed(ask.place, runs)
        ask.item.wanted = joined([*ask.item.wanted, *runs])

    # Computing here -----------------------------------------------------------------

    def _fetch(self) -> None:
        """What nodes have that compute nothing is fetched, once for all that ask for it."""
        groups: dict[tuple[Context, str], list[Ask]] = {}
        for ask in self._unserved:
            groups.setdefault((ask.item.context, ask.place), []).append(ask)
        self._unserved = []
        for (context, place), asks in groups.items():
            self._compute(context, place, asks)

    def _compute(self, context: Context, place: str, asks: Sequence[Ask]) -> None:
        wanted = joined(run for ask in asks for run in ask.runs)
        done: Runs = []
        failure: FabricError | None = None
        try:
            for some in fetched(context, place, wanted, self.operator.layer, self._patience):
                for ask in asks:
                    if mine := within(ask.runs, some.runs):
                        self.operator.compute(ask, some.within(mine))
                done += some.runs
                self.traffic.fetched_bytes += some.size_bytes
        except Retry as error:
            failure = error
        for ask in asks:
            if missed := without(ask.runs, joined(done)):
                self._missed(ask, missed, failure)

    def _patience(self) -> Deadline:
        return self.deadline.part(PATIENCE)

    # Following ----------------------------------------------------------------------

    def _follow(self, items: Sequence[Item]) -> list[tuple[Item, Runs]]:
        """Routes what is missed to where it is asked for next; answers what is nowhere."""
        missed: dict[Context, Runs] = {}
        for item in items:
            missed.setdefault(item.context, []).extend(item.wanted)
        nowhere = {
            context: joined(self._search(context).go_on(joined(runs), self.deadline.part(PATIENCE)))
            for context, runs in missed.items()
        }
        lost: list[tuple[Item, Runs]] = []
        for item in items:
            if runs := within(item.wanted, nowhere[item.context]):
                lost.append((item, runs))
                item.wanted = without(item.wanted, runs)
        return lost

    def _search(self, context: Context) -> Search:
        if context not in self._searches:
            self._searches[context] = Search(context)
        return self._searches[context]


def _gaps(asks: Sequence[Ask], arrived: Arrived) -> list[Runs]:
    """Of what was asked, what the node does not have."""
    found: list[Runs] = [[] for _ in asks]
    for gap in arrived.answer.gaps:
        if gap.query >= len(asks):
            raise Broken(f"node {arrived.link.node} tells of gaps in a query that it was not asked")
        found[gap.query].append((gap.first_token, gap.end_token))
    return [within(ask.runs, joined(runs)) for ask, runs in zip(asks, found, strict=True)]
