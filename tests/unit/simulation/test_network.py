"""The simulated network: distances, bandwidth, and what befalls messages."""

from __future__ import annotations

from typing import Any

import pytest

from kvfabric.simulation.engine import Simulation
from kvfabric.simulation.network import LinkClass, Links, Network, Place

LINKS = Links(
    host=LinkClass("host", 0.001, 1000.0),
    rack=LinkClass("rack", 0.01, 100.0),
    far=LinkClass("far", 0.1, 10.0),
)


class Town:
    """Four nodes: a and b on one host, c in their rack, d far from all."""

    def __init__(self, seed: int = 1) -> None:
        self.simulation = Simulation(seed)
        self.network = Network(self.simulation, LINKS)
        self.heard: list[tuple[str, str, Any]] = []
        places = {"a": ("h1", "r1"), "b": ("h1", "r1"), "c": ("h2", "r1"), "d": ("h3", "r2")}
        for name, (host, rack) in places.items():
            self.network.join(name, Place(host, rack), self._listen(name))

    def call(self, source: str, target: str, timeout_s: float = 10.0) -> list[Any]:
        """What the caller gets, once it does."""
        answers: list[Any] = []
        self.network.call(source, target, "ask", 1, timeout_s).then(answers.append)
        return answers

    def carry(self, source: str, target: str, size_bytes: int, rate: float = 0.0) -> list[Any]:
        """(whether it came, when)."""
        ends: list[Any] = []
        done = self.network.carry(source, target, size_bytes, rate)
        done.then(lambda came: ends.append((came, round(self.simulation.now_s, 3))))
        return ends

    def _listen(self, name: str) -> Any:
        def listen(caller: str, what: str, request: Any) -> Any:
            self.heard.append((name, caller, request))
            return f"{name} says"

        return listen


@pytest.mark.parametrize(("target", "link"), [("b", "host"), ("c", "rack"), ("d", "far")], ids=str)
def test_links_are_classed_by_host_and_rack(target: str, link: str) -> None:
    assert Town().network.link("a", target).name == link


def test_a_call_is_answered_after_both_ways() -> None:
    town = Town()
    answers = town.call("a", "d")
    town.simulation.run(0.19)
    assert answers == []
    town.simulation.run(0.25)
    assert answers == ["d says"]


def test_a_payload_takes_its_time_and_waits_for_busy_cards() -> None:
    town = Town()
    first, second = town.carry("a", "c", 100), town.carry("b", "c", 100)
    town.simulation.run(10.0)
    assert first == [(True, 1.01)]
    assert second == [(True, 2.01)]


def test_a_card_does_not_wait_for_a_busy_partner_while_another_is_free() -> None:
    town = Town()
    first, waits = town.carry("a", "c", 100), town.carry("b", "c", 100)
    passes = town.carry("b", "d", 10)
    town.simulation.run(10.0)
    assert first == [(True, 1.01)]
    assert passes == [(True, 1.1)]
    assert waits == [(True, 2.01)]


def test_a_throttled_payload_leaves_the_link_to_others() -> None:
    town = Town()
    slow, other = town.carry("a", "c", 100, rate=10.0), town.carry("a", "c", 100)
    town.simulation.run(20.0)
    assert slow == [(True, 10.01)]
    assert other == [(True, 2.01)]


def test_nobody_hears_through_a_cut_and_the_caller_is_told_in_time() -> None:
    town = Town()
    town.network.cut.add(frozenset(("a", "c")))
    answers, carried = town.call("a", "c", timeout_s=1.0), town.carry("a", "c", 100)
    other = town.call("a", "b")
    town.simulation.run(5.0)
    assert answers == [None]
    assert carried[0][0] is False
    assert other == ["b says"]
    assert [name for name, _, _ in town.heard] == ["b"]


def test_what_dies_while_it_is_sent_to_hears_nothing_in_its_next_life() -> None:
    town = Town()
    answers, carried = town.call("a", "d", timeout_s=1.0), town.carry("a", "d", 10)

    def die_and_rise() -> None:
        town.network.leave("d")
        town.network.join("d", Place("h3", "r2"), lambda *_: "reborn")

    town.simulation.after(0.05, die_and_rise)
    town.simulation.run(5.0)
    assert answers == [None]
    assert carried[0][0] is False
    assert town.heard == []


def test_messages_are_lost_and_doubled_by_chance() -> None:
    town = Town()
    town.network.loss = 0.5
    lost = [town.call("a", "b", timeout_s=1.0) for _ in range(200)]
    town.simulation.run(2.0)
    answered = sum(answers == ["b says"] for answers in lost)
    assert 20 < answered < 90  # a quarter: neither question nor answer was lost
    town.network.loss, town.network.doubles = 0.0, 1.0
    town.heard.clear()
    answers = town.call("a", "b")
    town.simulation.run(4.0)
    assert len(town.heard) == 2
    assert answers == ["b says"]


def test_a_slow_node_is_slow_for_messages_and_payloads() -> None:
    town = Town()
    town.network.slow["b"] = 10.0
    carried = town.carry("a", "b", 1000)
    town.simulation.run(30.0)
    assert carried == [(True, 10.01)]
