"""Sessions that have ended are told of once nothing of theirs is mapped any more."""

from __future__ import annotations

import mmap
import weakref

from kvfabric_client.ended import MAX_SESSIONS, EndedSessions

PLACE = "unix:/somewhere"


def test_a_session_has_let_go_when_its_last_view_is_gone() -> None:
    ended = EndedSessions()
    mapped = mmap.mmap(-1, 4096)
    view = memoryview(mapped)[10:20]
    ended.add(PLACE, b"viewed", [weakref.ref(mapped)])
    ended.add(PLACE, b"unmapped", [])
    del mapped
    assert ended.take("unix:/elsewhere") == []
    assert ended.take(PLACE) == [b"unmapped"]
    assert ended.take(PLACE) == []
    assert ended.any, "there is one to ask about again"
    view.release()
    del view
    assert ended.take(PLACE) == [b"viewed"]
    assert not ended.any


def test_only_so_many_are_remembered() -> None:
    ended = EndedSessions()
    sessions = [str(number).encode() for number in range(MAX_SESSIONS + 3)]
    for session in sessions:
        ended.add(PLACE, session, [])
    assert ended.take(PLACE) == sessions[3:]
