"""Debtor, creditor, manager and store die at every step of a loan: nothing is wrong or leaks.

A dozen of these run with every `make test`, all of them with `make test-faults`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from tests.faults.loans.conftest import BLOCK_TOKENS, GROWN, Growth, Lenders
from tests.redis_server import RedisServer

from kvfabric_client.sequence_reads import Place

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

exhaustive = pytest.mark.exhaustive

CREDITOR = (
    "lend.reserved",
    pytest.param("lend.sealed", marks=exhaustive),
    pytest.param("pull.started", marks=exhaustive),
    "pull.reserved",
    pytest.param("pull.sealed", marks=exhaustive),
)
DEBTOR = (
    pytest.param("borrow.asked", marks=exhaustive),
    "borrow.reserved",
    pytest.param("pull.reading", marks=exhaustive),
    "borrow.seen",
    pytest.param("borrow.dropped", marks=exhaustive),
)


@pytest.mark.parametrize("point", CREDITOR)
def test_a_creditor_dies(lenders: Lenders, point: str) -> None:
    lenders.start(east=f"{point}=kill")
    growth = Growth(lenders.client())

    lenders.fallen("east")
    growth.wait()

    # The debtor drops nothing before a replica is seen elsewhere, and none was at east yet.
    assert growth.missing() == 0
    lenders.check_books()
    growth.close()
    lenders.check_quiet()


@pytest.mark.parametrize("point", DEBTOR)
def test_a_debtor_dies_and_its_writer_goes_on_elsewhere(lenders: Lenders, point: str) -> None:
    lenders.start(home=f"{point}=kill")
    growth = Growth(lenders.client())

    lenders.fallen("home")
    growth.wait()

    # What home alone held is gone, and said to be; the rest is right.
    assert growth.missing() <= GROWN * BLOCK_TOKENS
    growth.close()
    lenders.check_quiet()


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("home", "borrow.asked"),
        pytest.param("home", "borrow.reserved", marks=exhaustive),
        pytest.param("east", "lend.reserved", marks=exhaustive),
        pytest.param("east", "pull.sealed", marks=exhaustive),
        ("home", "borrow.seen"),
    ],
)
def test_the_manager_dies_meanwhile(lenders: Lenders, name: str, point: str) -> None:
    lenders.patience_s = 20.0  # a node is stopped while a manager starts
    lenders.start(**{name: f"{point}=stop"})
    growth = Growth(lenders.client())
    lenders.stopped(name)

    lenders.restart_manager()
    lenders.nodes[name].resume()
    growth.wait()

    assert growth.missing() == 0
    lenders.check_books()
    growth.close()
    lenders.check_quiet()


@pytest.mark.parametrize(
    "point", ["borrow.reserved", pytest.param("borrow.seen", marks=exhaustive)]
)
def test_redis_dies_meanwhile(lenders: Lenders, redis_server: RedisServer, point: str) -> None:
    lenders.start(redis_server.address, home=f"{point}=stop")
    growth = Growth(lenders.client())
    lenders.stopped("home")

    redis_server.kill()
    lenders.nodes["home"].resume()
    growth.wait()  # what is lent is not in the store: it goes on without

    assert growth.missing() == 0
    redis_server.start()
    lenders.check_books()
    growth.close()
    lenders.check_quiet()


def settled(look: Callable[[], list[Place]]) -> list[Place]:
    """What is said twice, half a second apart: loans may still be on their way."""
    before = look()
    for _ in range(20):
        time.sleep(0.5)
        now = look()
        if now == before:
            return now
        before = now
    raise AssertionError("blocks move without end")


def test_a_creditor_that_held_much_dies_and_just_that_is_missing(lenders: Lenders) -> None:
    lenders.start()
    growth = Growth(lenders.client()).wait()
    assert growth.missing() == 0
    lent = settled(lambda: [place for place in growth.sequence.blocks() if place.node == "east"])
    assert lent

    lenders.nodes["east"].kill()
    lenders.fallen("east")

    assert growth.missing() == len(lent) * BLOCK_TOKENS
    lenders.check_books()
    growth.close()
    lenders.check_quiet()


def test_a_full_creditor_is_passed_over(lenders: Lenders) -> None:
    lenders.start()
    greedy = Growth(lenders.client("east"), blocks=8 * 32, seed=2).wait()

    growth = Growth(lenders.client()).wait()

    assert growth.missing() == 0
    assert greedy.missing() == 0
    lenders.check_books()
    growth.close()
    greedy.close()
    lenders.check_quiet()


def test_a_debtor_that_returns_with_a_new_incarnation_owes_nothing(lenders: Lenders) -> None:
    lenders.start()
    growth = Growth(lenders.client()).wait()
    assert lenders.ledger().lent_bytes > 0

    lenders.nodes["home"].kill()
    lenders.start_node("home")

    # The client opens its sequence again by itself, with what the creditors still hold.
    assert growth.missing() <= 32 * BLOCK_TOKENS
    lenders.check_books()
    growth.close()
    lenders.check_quiet()
