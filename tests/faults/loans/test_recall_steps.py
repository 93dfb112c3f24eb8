"""A creditor wants its memory back, and somebody dies at every step of it.

Some of these run with every `make test`, all of them with `make test-faults`.
"""

from __future__ import annotations

import pytest
from tests.faults.loans.conftest import BLOCK_TOKENS, GROWN, Growth, Lenders

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

exhaustive = pytest.mark.exhaustive
EAST_BLOCKS = 8 * 32  # all that fits into its memory


def lent_by(lenders: Lenders, creditor: str) -> int:
    lent = lenders.ledger().lent
    return sum(
        size for name, size in zip(lent.creditor, lent.size_bytes, strict=True) if name == creditor
    )


def test_lent_memory_comes_back_to_who_needs_it(lenders: Lenders) -> None:
    lenders.start()
    debtor = Growth(lenders.client()).wait()
    assert lent_by(lenders, "east") > 0

    creditor = Growth(lenders.client("east"), EAST_BLOCKS, seed=2).wait()

    assert debtor.missing() == 0
    assert creditor.missing() == 0
    lenders.check_books()
    debtor.close()
    creditor.close()
    lenders.check_quiet()


@pytest.mark.parametrize(
    "point", ["recall.heard", pytest.param("recall.returned", marks=exhaustive)]
)
def test_the_debtor_dies(lenders: Lenders, point: str) -> None:
    lenders.start(home=f"{point}=kill")
    debtor = Growth(lenders.client()).wait()

    creditor = Growth(lenders.client("east"), EAST_BLOCKS, seed=2)
    lenders.fallen("home")
    creditor.wait()

    assert creditor.missing() == 0
    assert debtor.missing() <= GROWN * BLOCK_TOKENS
    debtor.close()
    creditor.close()
    lenders.check_quiet()


def test_the_creditor_dies(lenders: Lenders) -> None:
    lenders.start(east="recall.asked=kill")
    debtor = Growth(lenders.client()).wait()
    at_east = [place for place in debtor.sequence.blocks() if place.node == "east"]

    creditor = Growth(lenders.client("east"), EAST_BLOCKS, seed=2)
    lenders.fallen("east")
    creditor.stop()

    assert debtor.missing() <= len(at_east) * BLOCK_TOKENS
    debtor.close()
    creditor.close()
    lenders.check_quiet()


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("home", "recall.heard"),
        pytest.param("home", "recall.returned", marks=exhaustive),
        pytest.param("east", "recall.asked", marks=exhaustive),
    ],
)
def test_the_manager_dies_meanwhile(lenders: Lenders, name: str, point: str) -> None:
    lenders.patience_s = 20.0  # a node is stopped while a manager starts
    lenders.start(**{name: f"{point}=stop"})
    debtor = Growth(lenders.client()).wait()

    creditor = Growth(lenders.client("east"), EAST_BLOCKS, seed=2)
    lenders.stopped(name)
    lenders.restart_manager()
    lenders.nodes[name].resume()
    creditor.wait()

    assert debtor.missing() == 0
    assert creditor.missing() == 0
    lenders.check_books()
    debtor.close()
    creditor.close()
    lenders.check_quiet()
