"""Borrow, Ledger and ListPlans of ControlService, and the thread's work of planning."""

from __future__ import annotations

import time
from typing import Any

from kvfabric.errors import Refused
from kvfabric.lending import planner
from kvfabric.lending.loans import LoanState, to_columns
from kvfabric.manager import messages
from kvfabric.manager.calls import Calls, log, translated
from kvfabric.rpc.v1 import control_pb2

MAX_EXCLUDED = 4096


class LendingCalls(Calls):
    """See the module."""

    def Borrow(  # noqa: N802
        self, request: control_pb2.BorrowRequest, context: Any
    ) -> control_pb2.BorrowResponse:
        with translated(context):
            node = messages.node_id(request.node)
            if len(request.exclude) > MAX_EXCLUDED:
                raise Refused(f"{len(request.exclude)} nodes are over {MAX_EXCLUDED} to exclude")
            exclude = {messages.node_id(each) for each in request.exclude}
            with self._lock:
                self._metrics.value("kvfabric_manager_borrows_total").value += 1
                found = self._core.lending.borrow(
                    node, request.incarnation, request.size_bytes, exclude, self._clock.now()
                )
                return control_pb2.BorrowResponse(
                    nodes=[member.node for member in found.creditors],
                    endpoints=[member.endpoints for member in found.creditors],
                    free_bytes=found.free_bytes,
                    reason=found.reason,
                )

    def Ledger(  # noqa: N802
        self, request: control_pb2.LedgerRequest, context: Any
    ) -> control_pb2.LedgerResponse:
        with translated(context), self._lock:
            ledger = self._core.cluster.ledger
            return control_pb2.LedgerResponse(
                lent=to_columns(ledger.lent()),
                borrowed=to_columns(ledger.borrowed()),
                lent_bytes=ledger.lent_bytes(),
                borrowed_bytes=ledger.borrowed_bytes(),
            )

    def ListPlans(  # noqa: N802
        self, request: control_pb2.ListPlansRequest, context: Any
    ) -> control_pb2.ListPlansResponse:
        with translated(context), self._lock:
            now_s = self._clock.now()
            return control_pb2.ListPlansResponse(
                plans=[messages.plan(each, now_s) for each in self._core.planning.plans]
            )

    def plan(self) -> None:
        """A round of the planner if it is time. The plan itself is made without the lock."""
        with self._lock:
            planning = self._core.planning
            now_s = self._clock.now()
            demand = planning.demand(now_s) if planning.due(now_s) else None
        if demand is None:
            return
        begun_s = time.perf_counter()
        found = planner.plan(demand.instances, demand.contexts, demand.rates, planning.rules)
        spent_s = time.perf_counter() - begun_s
        with self._lock:
            ordered = planning.adopt(found, self._clock.now())
            self._metrics.histogram("kvfabric_manager_plan_seconds").observe(spent_s)
        for each in ordered:
            log.info(
                "loan planned",
                debtor=each.debtor,
                creditor=each.creditor,
                sequence=each.sequence,
                size_bytes=each.size_bytes,
                why=each.why,
            )

    def _set_lending_gauges(self) -> None:
        """To be called under the lock."""
        ledger, planning = self._core.cluster.ledger, self._core.planning
        orders = self._core.cluster.orders
        states = ledger.states()
        for state in LoanState:
            name = state.name.lower()
            self._metrics.value("kvfabric_manager_loans", name).value = states[state]
        for name, value in (
            ("lent_bytes", ledger.lent_bytes()),
            ("borrowed_bytes", ledger.borrowed_bytes()),
            ("plans_total", planning.decisions),
            ("planned_bytes_total", planning.planned_bytes),
            ("commands_total", orders.posted),
            ("commands_refused_total", orders.refused),
        ):
            self._metrics.value(f"kvfabric_manager_{name}").value = value
