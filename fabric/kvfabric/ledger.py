"""Loans of memory: their states, and the cluster's books of who owes whom what."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from kvfabric.rpc.v1 import control_pb2


class LoanState(enum.IntEnum):
    """One loan, as either side sees it."""

    REQUESTED = control_pb2.LOAN_STATE_REQUESTED  # asked of a creditor, unanswered
    GRANTED = control_pb2.LOAN_STATE_GRANTED  # space is reserved, bytes are on their way
    HELD = control_pb2.LOAN_STATE_HELD  # the creditor has them
    RECALLED = control_pb2.LOAN_STATE_RECALLED  # the creditor wants its memory back
    MOVING = control_pb2.LOAN_STATE_MOVING  # on the way to another creditor, or home
    RETURNED = control_pb2.LOAN_STATE_RETURNED  # ended by the debtor
    VOID = control_pb2.LOAN_STATE_VOID  # ended by a deadline, a refusal or a death


_ENDS = frozenset({LoanState.RETURNED, LoanState.VOID})

TRANSITIONS: Mapping[LoanState, frozenset[LoanState]] = {
    LoanState.REQUESTED: _ENDS | {LoanState.GRANTED, LoanState.HELD},
    LoanState.GRANTED: _ENDS | {LoanState.HELD, LoanState.RECALLED},
    LoanState.HELD: _ENDS | {LoanState.RECALLED, LoanState.MOVING},
    LoanState.RECALLED: _ENDS | {LoanState.MOVING},
    LoanState.MOVING: _ENDS | {LoanState.HELD, LoanState.RECALLED},
    LoanState.RETURNED: frozenset(),
    LoanState.VOID: frozenset(),
}

# The creditor has set memory aside: what counts as lent, and as borrowed.
COUNTED = frozenset({LoanState.GRANTED, LoanState.HELD, LoanState.RECALLED, LoanState.MOVING})
