"""Lending's questions to others: numbered, bounded in time, each answered once.

Who asks says what to do with the answer. An answer that comes twice, or after its time,
is nobody's any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvfabric.rpc.v1 import types_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.copying.pulls import PullOrder
from kvfabric_nodes.lending.instructions import (
    AskCreditors,
    AskPlaces,
    AskReplicas,
    CallPeer,
    CancelFetch,
    Fetch,
    Instruction,
    Request,
)

CALL_S = 3.0  # after that, an answer does not come any more

Then = Callable[[Any, str, float], None]  # the answer or None, why there is none, the time


class Post:
    """See the module."""

    def __init__(self) -> None:
        self._outbox: list[Instruction] = []
        self._waiting: dict[int, tuple[float, Then]] = {}  # oldest first
        self._tickets = 0

    def take(self) -> list[Instruction]:
        """What is to be carried out now, in this order."""
        taken, self._outbox = self._outbox, []
        return taken

    def number(self) -> int:
        """A fresh one: tickets, loans and orders never share a number."""
        self._tickets += 1
        return self._tickets

    def call(
        self,
        node: str,
        endpoints: types_pb2.Endpoints,
        name: str,
        request: Request,
        then: Then,
        now_s: float,
    ) -> int:
        ticket = self._ask(then, now_s)
        self._outbox.append(CallPeer(ticket, node, endpoints, name, request))
        return ticket

    def places(self, namespace: NamespaceId, keys: Sequence[Key], then: Then, now_s: float) -> int:
        ticket = self._ask(then, now_s)
        self._outbox.append(AskPlaces(ticket, namespace, tuple(keys)))
        return ticket

    def replicas(
        self, namespace: NamespaceId, keys: Sequence[Key], then: Then, now_s: float
    ) -> int:
        ticket = self._ask(then, now_s)
        self._outbox.append(AskReplicas(ticket, namespace, tuple(keys)))
        return ticket

    def creditors(self, size_bytes: int, exclude: Sequence[str], then: Then, now_s: float) -> int:
        ticket = self._ask(then, now_s)
        self._outbox.append(AskCreditors(ticket, size_bytes, tuple(exclude)))
        return ticket

    def fetch(self, order: PullOrder) -> None:
        self._outbox.append(Fetch(order))

    def cancel(self, order_id: int) -> None:
        self._outbox.append(CancelFetch(order_id))

    def answered(self, ticket: int, answer: object, why: str, now_s: float) -> None:
        """Hands the answer to who asked; does nothing if nobody waits for it."""
        _, then = self._waiting.pop(ticket, (0.0, None))
        if then is not None:
            then(answer, why, now_s)

    def tick(self, now_s: float) -> None:
        """Ends what waits for too long."""
        late: list[int] = []
        for ticket, (deadline_s, _) in self._waiting.items():
            if deadline_s > now_s:
                break
            late.append(ticket)
        for ticket in late:
            self.answered(ticket, None, f"no answer within {CALL_S:g} s", now_s)

    def due_s(self) -> float:
        """When `tick` has something to do."""
        return next((deadline_s for deadline_s, _ in self._waiting.values()), float("inf"))

    def _ask(self, then: Then, now_s: float) -> int:
        ticket = self.number()
        self._waiting[ticket] = (now_s + CALL_S, then)
        return ticket
