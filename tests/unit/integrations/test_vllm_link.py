"""The vLLM connector's link: an outage costs one failure, then nothing until the next try."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfabric.clock import ManualClock
from kvfabric.errors import Retry
from kvfabric.types import Namespace
from kvfabric_client import Room
from kvfabric_client.integrations._vllm_link import FIRST_RETRY_S, LAST_RETRY_S, Door, Link
from kvfabric_nodes.node import Node
from kvfabric_nodes.settings import NodeSettings

NAMESPACE = Namespace("default", bytes(32))


def test_a_fabric_that_is_gone_is_not_asked_again_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock()
    link = Link(Door(f"unix:{tmp_path}/n0.sock", NAMESPACE), "a test", 1.0, clock)
    pauses_s: list[float] = []
    for _ in range(8):
        assert link.call(lambda room: room.id) is None
        assert link.is_down
        paused_s = 0.0
        while link.is_down:
            clock.advance(FIRST_RETRY_S / 2)
            paused_s += FIRST_RETRY_S / 2
        pauses_s.append(paused_s)
    assert pauses_s == [1, 2, 4, 8, 16, LAST_RETRY_S, LAST_RETRY_S, LAST_RETRY_S]
    assert len(caplog.records) == 1


def test_while_it_is_down_nothing_is_tried(tmp_path: Path) -> None:
    clock = ManualClock()
    tried: list[Room] = []
    settings = NodeSettings(node="n0", memory=16 << 20, runtime_dir=tmp_path)
    node = Node(settings)
    node.start()
    link = Link(Door(f"unix:{settings.unix_path}", NAMESPACE), "a test", 5.0, clock)

    def fail(room: Room) -> None:
        tried.append(room)
        raise Retry("not now")

    try:
        assert link.call(fail) is None
        assert link.call(fail) is None
        assert len(tried) == 1

        clock.advance(FIRST_RETRY_S)
        assert link.call(lambda room: room.match([]).matched) == 0
        assert not link.is_down
        link.call(fail)  # after a success, the first pause is the shortest again
        clock.advance(FIRST_RETRY_S)
        assert not link.is_down
    finally:
        link.close()
        node.stop()
