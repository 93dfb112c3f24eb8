"""The simulated MetadataStore: durable over every death, and at times away."""

from __future__ import annotations

from collections.abc import Iterator

from kvfabric.errors import Retry
from kvfabric.stores import Entry, MemoryStore, Versioned


class SimulatedStore(MemoryStore):
    """While `away`, every call raises Retry and does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False

    def get(self, key: str) -> Versioned | None:
        self._reach()
        return super().get(key)

    def put(self, key: str, value: bytes) -> int:
        self._reach()
        return super().put(key, value)

    def compare_and_set(self, key: str, value: bytes, expected_version: int) -> int:
        self._reach()
        return super().compare_and_set(key, value, expected_version)

    def delete(self, key: str, expected_version: int | None = None) -> bool:
        self._reach()
        return super().delete(key, expected_version)

    def scan(self, prefix: str) -> Iterator[Entry]:
        self._reach()
        return super().scan(prefix)

    def _reach(self) -> None:
        if self.away:
            raise Retry("the simulated store is away; come again")
