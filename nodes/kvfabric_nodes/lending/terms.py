"""Who a node is to the others, and on what terms it lends and borrows."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvfabric.rpc.v1 import types_pb2


@dataclass(slots=True)
class Identity:
    """The shell keeps it up to date: the manager may raise the incarnation."""

    node: str
    incarnation: int
    endpoints: types_pb2.Endpoints = field(default_factory=types_pb2.Endpoints)


@dataclass(frozen=True, slots=True)
class Terms:
    """What an operator may set."""

    cap_bytes: int  # lent at most, in slots
    loan_s: float = 30.0  # a loan ends when it is not renewed for so long
    recall_s: float = 10.0  # what a debtor has to move its shards elsewhere
    lend_while_owing: bool = False  # else only as a debtor's last resort
