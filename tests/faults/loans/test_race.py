"""Two debtors race for the last room of one creditor: somebody goes without, and nothing breaks."""

from __future__ import annotations

import pytest
from tests.faults.conftest import until
from tests.faults.loans.conftest import BLOCK_TOKENS, QUIET_S, Growth, Lenders

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

OWN = 32  # blocks of a debtor's own memory
LENT = 2 * OWN  # blocks of the creditor's
WANTED = OWN + LENT  # of each: together a third more than there is


def test_two_debtors_race_for_the_last_room(lenders: Lenders) -> None:
    lenders.memory = {"home": "1MiB", "west": "1MiB", "east": "2MiB"}
    lenders.start()
    rivals = [
        Growth(lenders.client(name, timeout_s=2.0), WANTED, seed)
        for seed, name in enumerate(("home", "west"), start=1)
    ]

    # Both grow until nothing is left, and then are told so.
    until(lambda: all(rival.failures for rival in rivals), "both run out of room", QUIET_S)

    lenders.check_books()
    blocks = sum(rival.sequence.length // BLOCK_TOKENS for rival in rivals)
    assert blocks <= 2 * OWN + LENT
    assert blocks >= (2 * OWN + LENT) * 3 // 4
    first, second = rivals
    first.stop()
    assert first.missing() == 0
    assert second.missing() == 0

    # When one of them ends, the other one gets what it asked for.
    first.close()
    second.wait()
    assert second.sequence.length == WANTED * BLOCK_TOKENS
    assert second.missing() == 0
    second.close()
    lenders.check_quiet()
