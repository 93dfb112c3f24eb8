"""Heads that go from node to node: at every moment one node at most answers, whoever dies."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from kvfabric.errors import Conflict, Retry
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.sequences.handovers import Adopted, Handovers, Offer, Said
from kvfabric_nodes.sequences.states import NO_HEAD, Head, Name, States
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extents

from .conftest import SEGMENT_BYTES, SEGMENTS, Desk, key

NAME = b"n" * 32
FROZEN_S = 5.0


@dataclass
class Site:
    """A node with one state, as far as states go."""

    node: str
    alive: bool = True
    states: States = field(init=False)
    hands: Handovers = field(init=False)
    desk: Desk = field(init=False)

    def __post_init__(self) -> None:
        core = NodeCore(Extents(SEGMENTS, SEGMENT_BYTES))
        self.states, self.desk = States(core, first_version=10), Desk(core)
        self.hands = Handovers(self.states)
        self.desk.put([key(number) for number in range(4)])
        self.name: Name = (self.desk.namespace, NAME)

    def read(self) -> Head:
        return self.states.read(self.desk.session, self.desk.namespace, NAME)

    def swap(self, version: int, new: Key) -> tuple[bool, Head]:
        return self.states.swap(self.desk.session, self.desk.namespace, NAME, version, new, 0.0)

    def says(self, now_s: float) -> Said:
        """As StateCalls tells another node."""
        if not self.alive:
            return Said(ended=True)
        if offer := self.hands.frozen.get(self.name):
            return Said(offer.number, frozen_s=max(0.001, offer.until_s - now_s))
        left = self.hands.left.get(self.name)
        return Said(left.offer, left.node) if left else Said()

    def check(self) -> None:
        self.states.check()
        self.hands.check()
        self.desk.core.check()


def offered() -> tuple[Site, Site, Offer, Adopted]:
    """`a` has offered its head, `b` has adopted it."""
    a, b = Site("a"), Site("b")
    a.swap(0, key(1))
    offer = a.hands.freeze(a.name, FROZEN_S)
    assert offer is not None
    adopted = b.hands.adopt(b.name, offer.head, "a", offer.number, 0.0)
    return a, b, offer, adopted


def test_on_its_way_nobody_answers() -> None:
    a, b, _, adopted = offered()
    for site in (a, b):
        with pytest.raises(Retry, match="being moved"):
            site.read()
        with pytest.raises(Retry, match="being moved"):
            site.swap(10, key(2))
    assert not b.hands.hear(b.name, adopted, a.says(1.0), "b", 1.0, 1.0)
    assert a.hands.freeze(a.name, 9.0) is None


def test_the_source_lets_go_and_versions_go_on() -> None:
    a, b, _, adopted = offered()
    a.hands.leave(a.name, "b", 0.0)
    assert a.read() == NO_HEAD
    assert a.desk.core.shards.claims(*a.name[:1], key(1)) == 0

    assert b.hands.hear(b.name, adopted, a.says(0.1), "b", 0.1, 0.1)

    assert b.read() == Head(10, key(1))
    assert b.swap(10, key(2)) == (True, Head(11, key(2)))
    assert b.hands.adopted == {}
    a.check()
    b.check()


def test_what_thaws_stays_and_what_was_adopted_is_discarded() -> None:
    a, b, _, adopted = offered()
    a.hands.thaw(a.name)
    assert a.swap(10, key(2))[0]

    assert b.hands.hear(b.name, adopted, a.says(0.1), "b", 0.1, 0.1)

    assert b.read() == NO_HEAD
    assert b.desk.core.shards.claims(b.name[0], key(1)) == 0


def test_a_source_that_dies_frozen_leaves_the_head_to_who_adopted_it() -> None:
    a, b, _, adopted = offered()
    b.hands.hear(b.name, adopted, a.says(1.0), "b", 1.0, 1.1)
    a.alive = False
    assert b.hands.hear(b.name, adopted, a.says(2.0), "b", 2.0, 2.1)
    assert b.read() == Head(10, key(1))


def test_a_source_that_may_have_thawed_before_it_died_takes_the_head_along() -> None:
    a, b, _, adopted = offered()
    b.hands.hear(b.name, adopted, a.says(1.0), "b", 1.0, 1.1)
    a.alive = False
    assert b.hands.hear(b.name, adopted, a.says(2.0), "b", 2.0, FROZEN_S)
    assert b.read() == NO_HEAD


def test_another_offer_of_the_same_head_is_another_one() -> None:
    a, b, _, adopted = offered()
    a.hands.thaw(a.name)
    second = a.hands.freeze(a.name, 9.0)
    assert second is not None
    assert b.hands.hear(b.name, adopted, a.says(0.1), "b", 0.1, 0.1)  # to somebody else
    again = b.hands.adopt(b.name, second.head, "a", second.number, 0.2)
    assert again is b.hands.adopt(b.name, second.head, "a", second.number, 0.2)
    assert b.hands.hear(b.name, adopted, a.says(0.3), "b", 0.3, 0.3)  # the first says no more
    assert b.hands.adopted == {b.name: again}
    with pytest.raises(Conflict):  # the first comes late
        b.hands.adopt(b.name, adopted.head, "a", adopted.offer, 0.4)


def test_a_node_with_a_state_of_this_name_adopts_no_other() -> None:
    a, b, offer, _ = offered()
    c = Site("c")
    c.swap(0, key(3))
    with pytest.raises(Conflict, match="on this node already"):
        c.hands.adopt(c.name, offer.head, "a", offer.number, 0.0)
    with pytest.raises(Conflict, match="on this node already"):
        b.hands.adopt(b.name, offer.head, "c", 99, 0.0)
    assert a.hands.left == {}


def test_reports_tell_what_changed_and_in_full_all_there_is() -> None:
    a, b, _, adopted = offered()
    other = b"m" * 32
    a.states.swap(a.desk.session, a.desk.namespace, other, 0, key(2), 0.0)

    def told(site: Site, *, full: bool = False) -> list[tuple[bytes, bool, str]]:
        return [(h.names, h.gone, h.node) for h in site.hands.report(full=full)]

    assert told(a) == [(other + NAME, False, "")]
    assert told(b) == [(NAME, False, "")]  # one that is adopted counts as here
    assert told(a) == []
    a.hands.leave(a.name, "b", 0.0)
    a.states.swap(a.desk.session, a.desk.namespace, other, 11, Key(b""), 0.0)
    assert told(a) == [(other, True, ""), (NAME, True, "b")]
    assert told(a, full=True) == [(NAME, True, "b")]
    b.hands.hear(b.name, adopted, a.says(0.1), "b", 0.1, 0.1)
    assert told(b, full=True) == [(NAME, False, "")]


def test_a_state_that_is_made_is_newer_than_all_that_were_made_before_elsewhere() -> None:
    core = NodeCore(Extents(SEGMENTS, SEGMENT_BYTES))
    states, desk = States(core, first_version=1000, began_s=7.0), Desk(core)
    desk.put([key(1)])
    _, head = states.swap(desk.session, desk.namespace, NAME, 0, key(1), 9.0)
    assert head.version == 1000 + 2_000_000_000


@dataclass
class Flight:
    """One offer, and how far it is."""

    source: Site
    destination: Site
    offer: Offer
    adopted: Adopted | None = None
    answer: bool | None = None  # on its way back
    asked: list[tuple[float, Said]] = field(default_factory=list)  # answers on their way


class History:
    """Three nodes, one state, messages that come late or never, clocks that go on meanwhile."""

    def __init__(self, seed: int, *, deaths: bool) -> None:
        self.chance = random.Random(seed)
        self.deaths = deaths
        self.now_s = 0.0
        self.sites = [Site(node) for node in "abc"]
        self.flights: list[Flight] = []
        self.truth = self.sites[0].swap(0, key(0))[1]

    def step(self) -> None:
        self.now_s += self.chance.choice([0.0, 0.1, 1.0, 3.0])
        acts = [self.offer, self.adopt, self.answer, self.lose, self.ask, self.hear, self.use]
        if self.deaths and self.chance.random() < 0.03:
            acts = [self.kill]
        self.chance.choice(acts)()
        for site in self.sites:
            site.check()
        self.look()

    def look(self) -> None:
        """Whoever answers says the truth."""
        for site in self.sites:
            if site.alive and (head := self.answered(site)).version:
                assert head == self.truth, (site.node, head, self.truth)

    def answered(self, site: Site) -> Head:
        try:
            return site.read()
        except Retry:
            return NO_HEAD

    def offer(self) -> None:
        source, destination = self.chance.sample(self.sites, 2)
        if source.alive and (o := source.hands.freeze(source.name, self.now_s + FROZEN_S)):
            self.flights.append(Flight(source, destination, o))

    def adopt(self) -> None:
        """The offer arrives; the destination asks once before it says yes."""
        for flight in self.some(lambda f: f.adopted is None and f.answer is None):
            to, name = flight.destination, flight.source.name
            if not to.alive:
                self.flights.remove(flight)
                if flight.source.hands.frozen.get(name) == flight.offer:
                    flight.source.hands.thaw(name)  # nobody is there
                continue
            try:
                flight.adopted = to.hands.adopt(
                    name, flight.offer.head, flight.source.node, flight.offer.number, self.now_s
                )
            except Conflict:
                flight.answer = False
                continue
            said = flight.source.says(self.now_s)
            known = to.hands.hear(name, flight.adopted, said, to.node, self.now_s, self.now_s)
            flight.answer = not known

    def answer(self) -> None:
        for flight in self.some(lambda f: f.answer is not None):
            source, name = flight.source, flight.source.name
            if source.alive and source.hands.frozen.get(name) == flight.offer:
                if flight.answer:
                    source.hands.leave(name, flight.destination.node, self.now_s)
                else:
                    source.hands.thaw(name)
            flight.answer = None
            if flight.adopted is None:
                self.flights.remove(flight)

    def lose(self) -> None:
        """The answer never comes: the source waits for as long as it said."""
        for flight in self.some(lambda f: self.now_s >= f.offer.until_s):
            if flight.source.hands.frozen.get(flight.source.name) == flight.offer:
                flight.source.hands.thaw(flight.source.name)
                flight.answer = None

    def ask(self) -> None:
        for flight in self.some(lambda f: f.adopted is not None):
            flight.asked.append((self.now_s, flight.source.says(self.now_s)))

    def hear(self) -> None:
        for flight in self.some(lambda f: bool(f.asked)):
            asked_s, said = flight.asked.pop(0)
            to = flight.destination
            if not to.alive:
                continue
            assert flight.adopted is not None
            if (
                to.hands.hear(to.name, flight.adopted, said, to.node, asked_s, self.now_s)
                and flight.answer is None
            ):
                self.flights.remove(flight)

    def use(self) -> None:
        site = self.chance.choice(self.sites)
        if site.alive and (head := self.answered(site)).version:
            new = key(self.chance.randrange(4))
            site.desk.put([new])
            swapped, self.truth = site.swap(head.version, new)
            assert swapped
            assert self.truth.version > head.version

    def kill(self) -> None:
        self.chance.choice(self.sites).alive = False

    def some(self, wanted: object) -> list[Flight]:
        assert callable(wanted)
        found = [flight for flight in self.flights if wanted(flight)]
        return [self.chance.choice(found)] if found else []


@pytest.mark.parametrize("deaths", [False, True])
def test_one_node_at_most_answers_in_any_history(deaths: bool) -> None:
    moved = 0
    for seed in range(60):
        history = History(seed, deaths=deaths)
        for _ in range(120):
            history.step()
        moved += sum(bool(site.hands.left) for site in history.sites)
        if not deaths:  # it is somewhere, or on its way
            held = [s for s in history.sites if s.states.names() or s.hands.adopted]
            assert held
    assert moved > 20


def test_states_of_one_name_in_two_namespaces_move_on_their_own() -> None:
    a, b, _, _ = offered()
    other = NamespaceId(b"o" * 32)
    assert a.hands.freeze((other, NAME), 1.0) is None
    b.hands.adopt((other, NAME), Head(3, key(1)), "a", 1, 0.0)
    assert set(b.hands.adopted) == {b.name, (other, NAME)}


def test_a_call_that_gives_up_leaves_what_a_later_one_has_adopted() -> None:
    a, b, offer, first = offered()
    second = b.hands.adopt(b.name, offer.head, "a", offer.number + 1, 1.0)

    b.hands.give_up(b.name, first, 2.0)
    assert b.hands.adopted == {b.name: second}
    b.hands.give_up(b.name, second, 2.0)
    assert b.hands.adopted == {}
    a.check()
    b.check()
