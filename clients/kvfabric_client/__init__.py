"""The SDK of kvfabric: `connect()` gives a `Client`, `Client.open()` a `Room` to put and get in."""

from kvfabric_client.aio import AsyncClient, AsyncRoom
from kvfabric_client.aio import connect as connect_async
from kvfabric_client.client import Client, connect
from kvfabric_client.room import Match, Room, Run, View

__all__ = [
    "AsyncClient",
    "AsyncRoom",
    "Client",
    "Match",
    "Room",
    "Run",
    "View",
    "connect",
    "connect_async",
]
