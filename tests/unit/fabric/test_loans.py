"""The states of a loan, and its columns."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfabric.errors import Broken, Refused
from kvfabric.lending.loans import (
    COUNTED,
    ENDED,
    TRANSITIONS,
    Loan,
    LoanState,
    from_columns,
    move,
    to_columns,
)
from kvfabric.rpc.v1 import control_pb2

NAMES = st.sampled_from(["node-0", "node-1", "node-2"])
NUMBERS = st.integers(min_value=0, max_value=2**64 - 1)
LOANS = st.builds(
    Loan,
    NUMBERS,
    NAMES,
    NUMBERS,
    NAMES,
    NUMBERS,
    st.sampled_from(LoanState),
    NUMBERS,
    st.booleans(),
)


def test_every_state_is_the_protocols() -> None:
    named = {name.removeprefix("LOAN_STATE_") for name in control_pb2.LoanState.keys()}  # noqa: SIM118
    assert named == {state.name for state in LoanState} | {"UNSPECIFIED"}


@pytest.mark.parametrize(("state", "to"), list(itertools.product(LoanState, repeat=2)))
def test_only_the_tables_pairs_are_moves(state: LoanState, to: LoanState) -> None:
    if to is state or to in TRANSITIONS[state]:
        assert move(state, to) is to
    else:
        with pytest.raises(Broken, match=f"{state.name} cannot become {to.name}"):
            move(state, to)


def test_ends_are_ends_and_every_state_reaches_one() -> None:
    assert TRANSITIONS.keys() == set(LoanState)
    for state in LoanState:
        if state in ENDED:
            assert not TRANSITIONS[state]
        else:
            assert TRANSITIONS[state] >= ENDED
    assert COUNTED | ENDED | {LoanState.REQUESTED} == set(LoanState)


def test_only_what_takes_memory_is_owed() -> None:
    held = Loan(1, "a", 7, "b", 8, LoanState.HELD, 4096)
    assert held.owed_bytes == 4096
    assert held.moved(LoanState.RETURNED).owed_bytes == 0
    assert held.id == ("a", 7, 1)


@given(st.lists(LOANS, max_size=5))
def test_columns_bring_back_what_went_in(loans: list[Loan]) -> None:
    sent = control_pb2.Loans.FromString(to_columns(loans).SerializeToString())
    assert from_columns(sent) == loans


def test_an_older_node_does_not_say_what_is_in_place() -> None:
    held = Loan(1, "a", 7, "b", 8, LoanState.HELD, 4096)
    columns = to_columns([held])
    columns.ClearField("in_place")
    assert from_columns(columns) == [held]


def test_columns_that_do_not_fit_together_are_refused() -> None:
    columns = to_columns([Loan(1, "a", 7, "b", 8, LoanState.HELD, 4096)])
    columns.size_bytes.append(1)
    with pytest.raises(Refused, match="one element for each"):
        from_columns(columns)


def test_an_unknown_state_is_refused() -> None:
    columns = to_columns([Loan(1, "a", 7, "b", 8, LoanState.HELD, 4096)])
    columns.state[0] = control_pb2.LOAN_STATE_UNSPECIFIED
    with pytest.raises(Refused, match="unknown states"):
        from_columns(columns)
