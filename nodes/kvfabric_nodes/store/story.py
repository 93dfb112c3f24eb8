"""What a node remembers of its decisions, for `explain`: bounded, newest kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from kvfabric.types import Key, NamespaceId

STORY_EVENTS = 65536


@dataclass(frozen=True, slots=True)
class Decision:
    at_s: float
    namespace: NamespaceId
    key: Key
    what: str
    why: str


class Story:
    """A ring of decisions. Telling scans it: only people ask, and rarely."""

    def __init__(self, limit: int = STORY_EVENTS) -> None:
        self._ring: deque[tuple[float, NamespaceId, Key, str, str]] = deque(maxlen=limit)

    def note(self, at_s: float, namespace: NamespaceId, key: Key, what: str, why: str) -> None:
        self._ring.append((at_s, namespace, key, what, why))

    def tell(self, namespaces: frozenset[NamespaceId], key: bytes) -> Iterator[Decision]:
        """Decisions on keys that start with `key` in these namespaces, oldest first."""
        for at_s, namespace, seen, what, why in self._ring:
            if namespace in namespaces and seen.startswith(key):
                yield Decision(at_s, namespace, seen, what, why)
