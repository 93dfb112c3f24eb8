"""The journal remembers what is recent, and no more than it may."""

from __future__ import annotations

import pytest

from kvfabric.manager import journal
from kvfabric.manager.journal import Journal, JournalEvent
from kvfabric.types import NamespaceId, NodeId

ROOM = NamespaceId(b"r" * 32)
N0 = NodeId("n0")


def added(at_s: float, *numbers: int) -> JournalEvent:
    keys = b"".join(bytes([number]) * 32 for number in numbers)
    return JournalEvent(at_s, N0, "added", "", ROOM, keys)


def times(events: list[JournalEvent]) -> list[float]:
    return [event.at_s for event in events]


def test_the_oldest_keys_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_KEYS_BYTES", 4 * 32)
    events = Journal()
    for at_s in range(3):
        events.note(added(at_s, 1, 2))

    assert times(events.explain(ROOM, b"\x02\x02", [])) == [1, 2]

    events.note(added(3, 1, 2, 3, 4, 5))  # alone over the limit
    assert events.explain(ROOM, b"\x02\x02", []) == []
    events.note(added(4, 2))
    assert times(events.explain(ROOM, b"\x02\x02", [])) == [4]


def test_the_oldest_events_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_EVENTS", 2)
    events = Journal()
    for at_s in range(3):
        events.note(JournalEvent(at_s, N0, "lost", ""))

    assert times(events.explain(ROOM, b"\x02\x02", [N0])) == [1, 2]
    assert events.explain(ROOM, b"\x02\x02", []) == []


def test_other_namespaces_are_not_told_of() -> None:
    events = Journal()
    events.note(added(0, 1))

    assert events.explain(NamespaceId(b"o" * 32), b"\x01\x01", []) == []
    assert times(events.explain(None, b"\x01\x01", [])) == [0]
