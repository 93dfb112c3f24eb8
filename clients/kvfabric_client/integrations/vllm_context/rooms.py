"""The rooms of one engine: one for all requests that may share, and one per salt."""

from __future__ import annotations

from dataclasses import replace

from kvfabric.types import Namespace
from kvfabric_client import Client, Room, connect


class Rooms:
    """Opened on demand; for one thread at a time."""

    def __init__(self, home: str | None, space: Namespace, timeout_s: float) -> None:
        self._home = home
        self._space = space
        self._timeout_s = timeout_s
        self._client: Client | None = None
        self._rooms: dict[bytes, Room] = {}

    def room(self, salt: bytes) -> Room:
        """A FabricError where no node answers."""
        if self._client is None:
            self._client = connect(self._home, tenant=self._space.tenant, timeout_s=self._timeout_s)
        room = self._rooms.get(salt)
        if room is None:
            room = self._client.open(replace(self._space, salt=salt))
            self._rooms[salt] = room
        return room

    def close(self) -> None:
        client, self._client = self._client, None
        self._rooms.clear()
        if client is not None:
            client.close()
