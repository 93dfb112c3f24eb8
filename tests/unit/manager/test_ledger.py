"""The cluster's books: lent = borrowed, circles are found, a dead node's word is void."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfabric.errors import Broken, Refused
from kvfabric.lending.ledger import Debt, Difference, Entry, Ledger, cycles
from kvfabric.lending.loans import Loan, LoanState, to_columns
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import NodeId

A, B, C, D = (NodeId(name) for name in "abcd")
MIB = 1024 * 1024


def loan(
    debtor: str,
    creditor: str,
    size_bytes: int = MIB,
    number: int = 1,
    state: LoanState = LoanState.HELD,
    *,
    debtor_incarnation: int = 1,
    creditor_incarnation: int = 1,
) -> Loan:
    return Loan(
        number, debtor, debtor_incarnation, creditor, creditor_incarnation, state, size_bytes
    )


def say(ledger: Ledger, node: NodeId, *loans: Loan, incarnation: int = 1) -> None:
    ledger.report(node, incarnation, to_columns(loans))


def both(ledger: Ledger, *loans: Loan) -> None:
    """Every node of these loans reports those that it has a part in."""
    for node in sorted({each.debtor for each in loans} | {each.creditor for each in loans}):
        mine = [each for each in loans if node in (each.debtor, each.creditor)]
        say(ledger, NodeId(node), *mine)


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    ledger = Ledger()
    yield ledger
    ledger.check()


def test_what_both_sides_report_is_lent_and_borrowed_to_the_byte(ledger: Ledger) -> None:
    both(ledger, loan("a", "b", 3 * MIB), loan("c", "b", MIB, number=7))

    assert ledger.lent_bytes(B) == 4 * MIB
    assert ledger.borrowed_bytes(A) == 3 * MIB
    assert ledger.borrowed_bytes(C) == MIB
    assert ledger.lent_bytes() == ledger.borrowed_bytes() == 4 * MIB
    assert ledger.lent_bytes(A) == ledger.borrowed_bytes(B) == 0
    assert ledger.differences() == []


@pytest.mark.parametrize("state", list(LoanState))
def test_only_memory_that_is_set_aside_counts(ledger: Ledger, state: LoanState) -> None:
    both(ledger, loan("a", "b", MIB, state=state))

    aside = state in {
        LoanState.GRANTED,
        LoanState.HELD,
        LoanState.RECALLED,
        LoanState.MOVING,
    }
    assert ledger.lent_bytes() == ledger.borrowed_bytes() == (MIB if aside else 0)
    assert ledger.states()[state] == 1


def test_a_report_replaces_the_one_before(ledger: Ledger) -> None:
    both(ledger, loan("a", "b"), loan("a", "b", number=2))
    say(ledger, B, loan("a", "b", number=2))
    say(ledger, A, loan("a", "b", number=2))
    say(ledger, A, loan("a", "b", number=2))

    assert ledger.lent_bytes() == ledger.borrowed_bytes() == MIB
    say(ledger, B)
    say(ledger, A)
    assert ledger.lent_bytes() == ledger.borrowed_bytes() == 0


def test_where_the_sides_differ_both_words_are_told_and_the_creditors_counts(
    ledger: Ledger,
) -> None:
    say(ledger, A, loan("a", "b", 5 * MIB), loan("a", "c", MIB, number=2))
    say(ledger, B, loan("a", "b", 3 * MIB))
    say(ledger, C)

    assert ledger.differences() == [
        Difference(Entry("a", 1, 1, "b"), 3 * MIB, 5 * MIB),
        Difference(Entry("a", 1, 2, "c"), 0, MIB),
    ]
    assert ledger.debts() == [Debt(A, B, 3 * MIB)]


def test_what_a_node_says_of_others_loans_or_of_earlier_lives_is_ignored(ledger: Ledger) -> None:
    say(
        ledger,
        A,
        loan("b", "c"),
        loan("a", "b", debtor_incarnation=1),
        loan("c", "a", creditor_incarnation=1),
        loan("a", "d", number=9, debtor_incarnation=2),
        incarnation=2,
    )
    assert [each.loan for each in ledger.borrowed()] == [9]
    assert list(ledger.lent()) == []


def test_a_lost_nodes_word_is_void_and_the_others_stays_until_they_say_otherwise(
    ledger: Ledger,
) -> None:
    both(ledger, loan("a", "b"))
    ledger.drop(A)
    ledger.drop(A)
    assert ledger.lent_bytes() == MIB
    assert ledger.borrowed_bytes() == 0
    assert ledger.debts() == []  # nobody repays it
    say(ledger, B)
    assert ledger.lent_bytes() == 0


def test_a_debtor_that_started_anew_does_not_owe_what_its_earlier_life_borrowed(
    ledger: Ledger,
) -> None:
    both(ledger, loan("a", "b"))
    say(ledger, A, incarnation=2)
    assert ledger.debts() == []
    assert ledger.loans_between(A, B) == []


def test_states_that_nobody_knows_are_refused(ledger: Ledger) -> None:
    columns = to_columns([loan("a", "b")])
    columns.state[0] = control_pb2.LoanState.ValueType(99)
    with pytest.raises(Refused, match="99"):
        ledger.report(A, 1, columns)


def test_loans_between_two_nodes_come_largest_first_and_only_those_that_rest(
    ledger: Ledger,
) -> None:
    both(
        ledger,
        loan("a", "b", MIB, number=1),
        loan("a", "b", 3 * MIB, number=2),
        loan("a", "b", 2 * MIB, number=3, state=LoanState.RECALLED),
        loan("c", "b", 9 * MIB, number=4),
    )
    assert [each.loan for each in ledger.loans_between(A, B)] == [2, 1]


def test_two_nodes_that_owe_each_other_are_a_circle_of_the_lesser_debt(ledger: Ledger) -> None:
    both(ledger, loan("a", "b", 5 * MIB), loan("b", "a", 2 * MIB))
    assert ledger.cycles() == [[Debt(A, B, 2 * MIB), Debt(B, A, 2 * MIB)]]


def test_who_keeps_each_others_prefixes_in_place_has_nothing_to_repay(ledger: Ledger) -> None:
    kept = [replace(each, in_place=True) for each in (loan("a", "b"), loan("b", "a"))]
    both(ledger, *kept)
    assert ledger.lent_bytes() == ledger.borrowed_bytes() == 2 * MIB
    assert ledger.debts() == []
    assert ledger.cycles() == []
    assert ledger.loans_between(A, B) == []


def test_a_longer_circle_is_found_and_debts_outside_of_it_are_left_alone(ledger: Ledger) -> None:
    both(
        ledger,
        loan("a", "b", 3 * MIB),
        loan("b", "c", 2 * MIB),
        loan("c", "a", 4 * MIB),
        loan("d", "a", MIB),
        loan("c", "d", MIB, number=2),
    )
    found = ledger.cycles()
    assert found[0] == [Debt(A, B, 2 * MIB), Debt(B, C, 2 * MIB), Debt(C, A, 2 * MIB)]
    assert len(found) == 1  # a owes b, c owes a and d, d owes a: nothing leads back any more


def test_loans_that_are_being_ended_make_no_circle(ledger: Ledger) -> None:
    both(ledger, loan("a", "b"), loan("b", "a", state=LoanState.MOVING))
    assert ledger.cycles() == []


def test_check_finds_a_total_that_is_wrong() -> None:
    ledger = Ledger()
    both(ledger, loan("a", "b"))
    ledger._lent_bytes[B] += 1
    with pytest.raises(Broken, match="total"):
        ledger.check()


nodes = st.sampled_from([NodeId(name) for name in "abcdef"])
debts = st.dictionaries(st.tuples(nodes, nodes), st.integers(1, 100), max_size=20).map(
    lambda found: [Debt(*pair, size) for pair, size in found.items() if pair[0] != pair[1]]
)


def circular(owed: Iterable[tuple[NodeId, NodeId]]) -> bool:
    """Whether any node can be reached from itself."""
    pairs = set(owed)
    while True:
        more = {(one, end) for one, middle in pairs for start, end in pairs if middle == start}
        if more <= pairs:
            return any(one == other for one, other in pairs)
        pairs |= more


@given(debts)
def test_repaying_every_circle_leaves_none_and_nobody_repays_more_than_it_owes(
    owed: list[Debt],
) -> None:
    left = {(each.debtor, each.creditor): each.size_bytes for each in owed}
    for ring in cycles(owed):
        assert len({debt.size_bytes for debt in ring}) == 1
        for debt, following in zip(ring, [*ring[1:], ring[0]], strict=True):
            assert debt.creditor == following.debtor
            left[debt.debtor, debt.creditor] -= debt.size_bytes
    assert min(left.values(), default=0) >= 0
    assert not circular(pair for pair, size in left.items() if size)
