"""One loan from the first question to its return, with a death or a lost message at every step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvfabric.rpc.v1 import control_pb2
from kvfabric_nodes.store.core import NodeCore

from .conftest import SHARD_BYTES, key
from .lenders import SLOTS, Town, Weather

LOAN_S = 12.0
LIFE_S = 9.0
CALLED_S = 6.0  # how long a call that is lost takes a loan's step


def story(town: Town) -> None:
    """a's memory is full, b lends, wants it back (c lends), and a has the rest come home."""
    for number in range(SLOTS):
        town["a"].put(key(number))
    town.run(0.3)
    town["a"].make_room(4)
    town.run(LIFE_S / 3)
    recall = control_pb2.Command.Recall(debtor="a", size_bytes=2 * SHARD_BYTES)
    for name in ("b", "c"):
        town[name].lending.command(control_pb2.Command(id=1, recall=recall), 1, town.now_s)
        town[name].carry_out()
    for number in range(50, 53):
        town["a"].put(key(number))
    town.run(LIFE_S / 3)
    for old in list(town["a"].needed)[-6:]:
        town["a"].forget(old)
    for loan in town["a"].borrowed():
        home = control_pb2.Command.BringHome(loan=loan.loan)
        town["a"].lending.command(control_pb2.Command(id=2, bring_home=home), 1, town.now_s)
        town["a"].carry_out()
    town.run(LIFE_S / 3)


def lives(prepare: Callable[[Town, int], None], step: int) -> Town | None:
    """The story with something prepared for one of its steps; None: it has fewer."""
    town = Town(["a", "b", "c"], 1, Weather(call_s=1.0), loan_s=LOAN_S, recall_s=5.0)
    prepare(town, step)
    story(town)
    steps = town.happened
    town.run(2 * LOAN_S + CALLED_S)
    town.check()
    town.check_balance()
    return town if step <= steps else None


def over(town: Town) -> None:
    """When nobody needs anything any more, nothing is left of any loan."""
    for node in town.everybody():
        for old in list(node.needed):
            node.forget(old)
    town.run(LOAN_S)
    for node in town.everybody():
        assert not node.loans()
        assert_idle(node.core)


def assert_idle(core: NodeCore) -> None:
    core.check()
    books = core.books()
    assert (books.reserved_bytes, books.quarantined_bytes) == (0, 0)
    assert not core.shards.claimed_bytes
    assert len(core.sessions) == 1


def dies(name: str) -> Callable[[Town, int], None]:
    return lambda town, step: town.deaths.update({step: name})


def is_lost(town: Town, step: int) -> None:
    town.weather.lost_message = step


def comes_late(town: Town, step: int) -> None:
    town.weather.late_message = step
    town.weather.delay_s = 0.02


def test_the_story_goes_its_way() -> None:
    town = lives(lambda town, step: None, 0)
    assert town is not None
    words = {word for node in town.everybody() for k in range(SLOTS) for word in node.told(key(k))}
    assert words >= {"lent", "kept", "recalled", "returned"}
    assert town.sent > 15
    assert not town["a"].loans()
    over(town)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_death_after_any_event_leaves_no_debt(name: str) -> None:
    step = 1
    while (town := lives(dies(name), step)) is not None:
        over(town)
        step += 1
    assert step > 80


@pytest.mark.parametrize("happens", [is_lost, comes_late])
def test_any_message_may_be_lost_or_come_again(happens: Callable[[Town, int], None]) -> None:
    step = 1
    while (town := lives(happens, step)) is not None and step <= town.sent:
        assert not town.missing()
        over(town)
        step += 1
    assert step > 15
