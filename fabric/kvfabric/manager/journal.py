"""What the manager remembers of recent events, for `explain`: bounded, newest win.

Deltas are kept as the packed keys that came; full reports and losses are kept as one
event of their node, or one report would wash out everything else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from kvfabric.types import DIGEST_BYTES, NamespaceId, NodeId

MAX_EVENTS = 65_536
MAX_KEYS_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class JournalEvent:
    """Something that happened to a node, or to `keys` (32 bytes each) on it."""

    at_s: float
    node: NodeId
    what: str
    why: str
    namespace: NamespaceId | None = None  # None: the whole node
    keys: bytes = b""

    def concerns(self, namespace: NamespaceId | None, prefix: bytes) -> bool:
        """Whether one of the keys starts with `prefix`, in `namespace` or (None) any."""
        if namespace is not None and namespace != self.namespace:
            return False
        at = self.keys.find(prefix)
        while at >= 0 and at % DIGEST_BYTES:
            at = self.keys.find(prefix, at + 1)
        return at >= 0


class Journal:
    """See the module."""

    def __init__(self) -> None:
        self._events: deque[JournalEvent] = deque()
        self._keys_bytes = 0

    def note(self, event: JournalEvent) -> None:
        """Remember an event; its keys are cut at MAX_KEYS_BYTES by the caller's own limits."""
        self._events.append(event)
        self._keys_bytes += len(event.keys)
        while len(self._events) > MAX_EVENTS or self._keys_bytes > MAX_KEYS_BYTES:
            self._keys_bytes -= len(self._events.popleft().keys)

    def explain(
        self, namespace: NamespaceId | None, prefix: bytes, nodes: Iterable[NodeId]
    ) -> list[JournalEvent]:
        """Events of keys that start with `prefix`, and of the nodes these are or were on.

        Oldest first. `nodes` are those known to hold such keys now.
        """
        about = {id(event) for event in self._events if event.concerns(namespace, prefix)}
        concerned = {event.node for event in self._events if id(event) in about} | set(nodes)
        return [
            event
            for event in self._events
            if id(event) in about or (event.namespace is None and event.node in concerned)
        ]
