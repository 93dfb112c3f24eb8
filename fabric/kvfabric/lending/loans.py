"""A loan: bytes that a node (the creditor) holds for another (the debtor), and its states.

Both sides and the manager keep loans by these states; who moves one, and when, is told in
`kvfabric_nodes.lending.borrowing` and `kvfabric_nodes.lending.creditor`. Where the sides differ,
the creditor's view is the rule.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace

from kvfabric.errors import Broken, Refused
from kvfabric.rpc.v1 import control_pb2


class LoanState(enum.IntEnum):
    """How far a loan is."""

    # Asked of a creditor that has not answered yet; nothing counts as lent.
    REQUESTED = control_pb2.LOAN_STATE_REQUESTED
    # The creditor has reserved the space, and fetches the bytes; the debtor still has them.
    GRANTED = control_pb2.LOAN_STATE_GRANTED
    # The creditor has all bytes, and keeps them for as long as the loan is renewed.
    HELD = control_pb2.LOAN_STATE_HELD
    # The creditor wants its memory back, and takes it at the recall's deadline.
    RECALLED = control_pb2.LOAN_STATE_RECALLED
    # The debtor has the bytes copied to another creditor, or home.
    MOVING = control_pb2.LOAN_STATE_MOVING
    # The debtor gave everything back. The end.
    RETURNED = control_pb2.LOAN_STATE_RETURNED
    # A deadline, a refusal or a death ended it. The end.
    VOID = control_pb2.LOAN_STATE_VOID


_S = LoanState

# What may become of a loan in each state; every other pair is a bug.
TRANSITIONS: dict[LoanState, frozenset[LoanState]] = {
    # Answered; all was there already; given up before, or refused.
    _S.REQUESTED: frozenset({_S.GRANTED, _S.HELD, _S.RETURNED, _S.VOID}),
    # The bytes came; the creditor thought better of it; the debtor did; time ran out.
    _S.GRANTED: frozenset({_S.HELD, _S.RECALLED, _S.RETURNED, _S.VOID}),
    # Wanted back; moved on; no more needed; not renewed.
    _S.HELD: frozenset({_S.RECALLED, _S.MOVING, _S.RETURNED, _S.VOID}),
    # Enough came back, and the rest stays; on its way; all came back; the deadline came.
    _S.RECALLED: frozenset({_S.GRANTED, _S.HELD, _S.MOVING, _S.RETURNED, _S.VOID}),
    # What was not moved stays; wanted back meanwhile; all has moved; the deadline came.
    _S.MOVING: frozenset({_S.HELD, _S.RECALLED, _S.RETURNED, _S.VOID}),
    _S.RETURNED: frozenset(),
    _S.VOID: frozenset(),
}

# In these the creditor's memory is taken: what counts as lent, and as borrowed.
COUNTED = frozenset({_S.GRANTED, _S.HELD, _S.RECALLED, _S.MOVING})
ENDED = frozenset({_S.RETURNED, _S.VOID})

LoanId = tuple[str, int, int]  # debtor, its incarnation, its number of the loan


def move(state: LoanState, to: LoanState) -> LoanState:
    """The next state; a pair outside TRANSITIONS is a bug. Staying is no move, and allowed."""
    if to is not state and to not in TRANSITIONS[state]:
        raise Broken(f"a loan that is {state.name} cannot become {to.name}: see TRANSITIONS")
    return to


@dataclass(frozen=True, slots=True)
class Loan:
    """One loan as one side sees it. Incarnation 0: the side does not know it yet."""

    loan: int  # numbered by the debtor
    debtor: str
    debtor_incarnation: int
    creditor: str
    creditor_incarnation: int
    state: LoanState
    size_bytes: int  # slots, reserved ones included
    in_place: bool = False  # the creditor had the shards before: no bytes were moved for it

    @property
    def id(self) -> LoanId:
        """The same on both sides."""
        return (self.debtor, self.debtor_incarnation, self.loan)

    @property
    def owed_bytes(self) -> int:
        """What it counts for in the books: nothing before the grant and after the end."""
        return self.size_bytes if self.state in COUNTED else 0

    def moved(self, to: LoanState) -> Loan:
        return replace(self, state=move(self.state, to))


def to_columns(loans: Iterable[Loan]) -> control_pb2.Loans:
    columns = control_pb2.Loans()
    for loan in loans:
        columns.loan.append(loan.loan)
        columns.debtor.append(loan.debtor)
        columns.debtor_incarnation.append(loan.debtor_incarnation)
        columns.creditor.append(loan.creditor)
        columns.creditor_incarnation.append(loan.creditor_incarnation)
        columns.state.append(loan.state.value)
        columns.size_bytes.append(loan.size_bytes)
        columns.in_place.append(loan.in_place)
    return columns


def from_columns(columns: control_pb2.Loans) -> list[Loan]:
    """What another process says; columns that do not fit together, or a state unknown, are
    refused."""
    count = len(columns.loan)
    rest = (
        columns.debtor,
        columns.debtor_incarnation,
        columns.creditor,
        columns.creditor_incarnation,
        columns.state,
        columns.size_bytes,
        columns.in_place or [False] * count,  # an older node does not say
    )
    if any(len(column) != count for column in rest):
        lengths = ", ".join(str(len(column)) for column in rest)
        raise Refused(f"{count} loans, but {lengths} in their columns; send one element for each")
    known = {state.value for state in LoanState}
    if unknown := set(columns.state) - known:
        raise Refused(f"unknown states of loans {sorted(unknown)}; use the sender's version here")
    return [
        Loan(loan, debtor, debtor_life, creditor, life, LoanState(state), size_bytes, in_place)
        for loan, debtor, debtor_life, creditor, life, state, size_bytes, in_place in zip(
            columns.loan, *rest, strict=True
        )
    ]
