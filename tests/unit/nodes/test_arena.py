"""The arena's bytes: zeroed, sealed against cutting, faulted in while segments come and go."""

from __future__ import annotations

import os
import time

import pytest

from kvfabric_nodes.store.arena import PREFAULT_STEP_BYTES, Arena, Memory

SEGMENT_BYTES = 64 << 10


def _wait_until_ready(arena: Arena, size_bytes: int) -> None:
    until_s = time.monotonic() + 10
    while arena.ready_bytes < size_bytes:
        assert time.monotonic() < until_s, f"{arena.ready_bytes} of {size_bytes} after 10 s"
        time.sleep(0.005)


def test_every_segment_is_faulted_in_and_zero() -> None:
    arena = Arena([1, 2, 3], SEGMENT_BYTES)
    _wait_until_ready(arena, 3 * SEGMENT_BYTES)
    assert not any(bytes(arena.view(s, 0, SEGMENT_BYTES)).strip(b"\0") for s in (1, 2, 3))
    arena.close()


def test_what_is_written_while_it_is_faulted_in_stays() -> None:
    arena = Arena([1], 4 * PREFAULT_STEP_BYTES)
    view = arena.view(1, 3 * PREFAULT_STEP_BYTES, 5)
    view[:] = b"early"
    _wait_until_ready(arena, 4 * PREFAULT_STEP_BYTES)
    assert bytes(arena.view(1, 3 * PREFAULT_STEP_BYTES, 5)) == b"early"
    view.release()
    arena.close()


def test_a_replaced_segment_is_other_memory_and_the_old_one_lives_on_for_its_readers() -> None:
    arena = Arena([1], SEGMENT_BYTES)
    old = arena.view(1, 0, 6)
    old[:] = b"secret"
    arena.replace(1, 2)
    assert bytes(arena.view(2, 0, 6)) == bytes(6)
    assert bytes(old) == b"secret"
    with pytest.raises(KeyError):
        arena.view(1, 0, 6)
    _wait_until_ready(arena, SEGMENT_BYTES)
    arena.close()


def test_segments_may_be_replaced_while_they_are_faulted_in() -> None:
    arena = Arena([1], 8 * PREFAULT_STEP_BYTES)
    for number in range(1, 30):
        arena.replace(number, number + 1)
    _wait_until_ready(arena, 8 * PREFAULT_STEP_BYTES)
    arena.close()


def test_faulting_in_what_has_been_closed_is_nothing() -> None:
    memory = Memory(1, SEGMENT_BYTES)
    memory.close()
    assert not memory.prefault()


def test_nobody_can_cut_a_segment_short() -> None:
    memory = Memory(1, SEGMENT_BYTES)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(memory.fd, 0)
    memory.close()
