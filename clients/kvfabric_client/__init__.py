"""The SDK of kvfabric: `connect()` gives a `Client`, `Client.open()` a `Room` to put and get in.

Names are imported when they are first used, so that `kvfabric --help` waits for none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvfabric_client.aio import AsyncClient, AsyncRoom
    from kvfabric_client.aio import connect as connect_async
    from kvfabric_client.aio_sequence import AsyncGroup, AsyncSequence, AsyncState
    from kvfabric_client.answers import Match, Run, View
    from kvfabric_client.attention.answers import Attended, Best, Pages
    from kvfabric_client.attention.bank import Bank
    from kvfabric_client.attention.calls import attend_batch
    from kvfabric_client.attention.queries import Query
    from kvfabric_client.client import Client, connect
    from kvfabric_client.group import Group
    from kvfabric_client.room import Room
    from kvfabric_client.sequence import Sequence
    from kvfabric_client.sequence_reads import Missing
    from kvfabric_client.state import State, StateConflict

__all__ = [
    "AsyncClient",
    "AsyncGroup",
    "AsyncRoom",
    "AsyncSequence",
    "AsyncState",
    "Attended",
    "Bank",
    "Best",
    "Client",
    "Group",
    "Match",
    "Missing",
    "Pages",
    "Query",
    "Room",
    "Run",
    "Sequence",
    "State",
    "StateConflict",
    "View",
    "attend_batch",
    "connect",
    "connect_async",
]

_HOMES = {
    "AsyncClient": "aio",
    "AsyncGroup": "aio_sequence",
    "AsyncRoom": "aio",
    "AsyncSequence": "aio_sequence",
    "AsyncState": "aio_sequence",
    "Attended": "attention.answers",
    "Bank": "attention.bank",
    "Best": "attention.answers",
    "Client": "client",
    "Group": "group",
    "Match": "answers",
    "Missing": "sequence_reads",
    "Pages": "attention.answers",
    "Query": "attention.queries",
    "Room": "room",
    "Run": "answers",
    "Sequence": "sequence",
    "State": "state",
    "StateConflict": "state",
    "View": "answers",
    "attend_batch": "attention.calls",
    "connect": "client",
}


def __getattr__(name: str) -> Any:
    module, name_there = ("aio", "connect") if name == "connect_async" else (_HOMES.get(name), name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name_there)
    globals()[name] = value
    return value
