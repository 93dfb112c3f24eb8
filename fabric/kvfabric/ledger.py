"""The cluster's books of who owes whom what."""

from __future__ import annotations

from kvfabric.loans import COUNTED, TRANSITIONS, Loan, LoanState

__all__ = ["COUNTED", "TRANSITIONS", "Loan", "LoanState"]
