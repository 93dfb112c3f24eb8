"""`kvfabric ledger` and `kvfabric plans`: who lends memory to whom, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvfabric_client.cli.common import (
    Json,
    RuntimeDir,
    chosen_runtime_dir,
    console,
    known_manager,
    print_json,
    table,
)
from kvfabric_client.texts import duration, size

if TYPE_CHECKING:
    from kvfabric.lending.loans import Loan
    from kvfabric.rpc.v1 import control_pb2

CALL_DEADLINE_S = 5.0
LAST_PLANS = 20  # shown; --json has all that the gManager remembers


def ledger(runtime_dir: RuntimeDir = None, as_json: Json = False) -> None:
    """Show which node lends how much to which, as both sides say.

    While reports are on their way, or a node is away, the sides may differ: then what the
    creditor says counts.
    """
    from kvfabric_client.deadline import Deadline

    chosen_runtime_dir(runtime_dir)
    with known_manager() as manager:
        answer = manager.ledger(Deadline.after(CALL_DEADLINE_S))
    loans = merged(answer)
    if as_json:
        print_json(
            {
                "lent_bytes": answer.lent_bytes,
                "borrowed_bytes": answer.borrowed_bytes,
                "loans": loans,
            }
        )
    else:
        _show_ledger(answer, loans)


def plans(runtime_dir: RuntimeDir = None, as_json: Json = False) -> None:
    """Show what the planner had nodes lend lately, and why."""
    from kvfabric_client.deadline import Deadline

    chosen_runtime_dir(runtime_dir)
    with known_manager() as manager:
        found = manager.plans(Deadline.after(CALL_DEADLINE_S))
    if as_json:
        print_json([_plan(each) for each in found])
    else:
        _show_plans(found)


def merged(answer: control_pb2.LedgerResponse) -> list[dict[str, Any]]:
    """One entry for each loan, in a settled order, with the word of either side or None."""
    from kvfabric.lending.loans import from_columns

    found: dict[tuple[str, int, int, str], dict[str, Any]] = {}
    for side, columns in (("creditor", answer.lent), ("debtor", answer.borrowed)):
        for loan in from_columns(columns):
            entry = found.setdefault((*loan.id, loan.creditor), _loan(loan))
            entry[f"{side}_says"] = {"state": loan.state.name.lower(), "bytes": loan.size_bytes}
    return [found[key] for key in sorted(found)]


def _loan(loan: Loan) -> dict[str, Any]:
    return {
        "debtor": loan.debtor,
        "creditor": loan.creditor,
        "loan": loan.loan,
        "debtor_incarnation": loan.debtor_incarnation,
        "creditor_incarnation": loan.creditor_incarnation,
        "creditor_says": None,
        "debtor_says": None,
    }


def _plan(plan: control_pb2.Plan) -> dict[str, Any]:
    return {
        "age_s": plan.age_ms / 1000,
        "debtor": plan.debtor,
        "creditor": plan.creditor,
        "sequence": plan.sequence,
        "bytes": plan.size_bytes,
        "tokens_per_s": plan.gain,
        "why": plan.why,
    }


def _show_ledger(answer: control_pb2.LedgerResponse, loans: list[dict[str, Any]]) -> None:
    out = console()
    if not loans:
        out.print("no node lends to another now")
        return
    rows = table("debtor", "creditor", "loan", "size", "state", right=("loan", "size"))
    for each in loans:
        words = [each["creditor_says"], each["debtor_says"]]
        said = next(word for word in words if word is not None)
        rows.add_row(
            each["debtor"],
            each["creditor"],
            str(each["loan"]),
            size(said["bytes"]),
            said["state"] + _difference(*words),
        )
    out.print(rows)
    out.print(f"lent {size(answer.lent_bytes)}, borrowed {size(answer.borrowed_bytes)}")


def _difference(creditor: dict[str, Any] | None, debtor: dict[str, Any] | None) -> str:
    if creditor is None:
        return ", but the creditor knows of none"
    if debtor is None:
        return ", but the debtor knows of none"
    if creditor["bytes"] != debtor["bytes"]:
        return f", but the debtor says {size(debtor['bytes'])}"
    return ""


def _show_plans(found: list[control_pb2.Plan]) -> None:
    out = console()
    if not found:
        out.print("nothing was planned lately")
        return
    rows = table("ago", "debtor", "creditor", "size", "why", right=("ago", "size"))
    for each in found[-LAST_PLANS:]:
        ago = duration(each.age_ms / 1000)
        rows.add_row(ago, each.debtor, each.creditor, size(each.size_bytes), each.why)
    out.print(rows)
    if len(found) > LAST_PLANS:
        out.print(f"and {len(found) - LAST_PLANS:,} before that: --json has them")
