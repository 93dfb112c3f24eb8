"""What lending wants done: its core puts these out, and shells bring the results back.

Every instruction with a ticket gets exactly one answer, at the latest when its deadline
has passed (`post.CALL_S`); one that never comes is taken for None. Every Fetch ends in one
`Lending.fetched`, however long that takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfabric.rpc.v1 import node_pb2, types_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.copying.pulls import PullOrder

Request = (
    node_pb2.LendRequest
    | node_pb2.RenewLoansRequest
    | node_pb2.ReturnLoanRequest
    | node_pb2.RecallLoanRequest
)
Response = (
    node_pb2.LendResponse
    | node_pb2.RenewLoansResponse
    | node_pb2.ReturnLoanResponse
    | node_pb2.RecallLoanResponse
)
CALLS = {  # as the wire names them
    "Lend": "lend",
    "RenewLoans": "renew_loans",
    "ReturnLoan": "return_loan",
    "RecallLoan": "recall_loan",
}


@dataclass(frozen=True, slots=True)
class AskCreditors:
    """Ask the manager who could lend so much -> `Lending.creditors`."""

    ticket: int
    size_bytes: int
    exclude: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class CallPeer:
    """Call another node's NodeService -> `Lending.answered`."""

    ticket: int
    node: str
    endpoints: types_pb2.Endpoints
    name: str  # of the call: one of CALLS
    request: Request


@dataclass(frozen=True, slots=True)
class AskPlaces:
    """Ask the manager where each key lies -> `Lending.placed`."""

    ticket: int
    namespace: NamespaceId
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class AskReplicas:
    """The same, with how these nodes are reached -> `Lending.replicas`."""

    ticket: int
    namespace: NamespaceId
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Fetch:
    """Copy shards here, into room that the order's reservation holds -> `Lending.fetched`."""

    order: PullOrder


@dataclass(frozen=True, slots=True)
class CancelFetch:
    """The order is not needed any more; it still ends in `Lending.fetched`."""

    order_id: int


Instruction = AskCreditors | CallPeer | AskPlaces | AskReplicas | Fetch | CancelFetch
