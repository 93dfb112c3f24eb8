"""A node's heartbeats, to a manager that is never content."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvfabric.rpc.v1 import control_pb2, control_pb2_grpc
from kvfabric.types import PROTOCOL_VERSION
from kvfabric_nodes.node import Node
from kvfabric_nodes.settings import NodeSettings


class Grumbler(control_pb2_grpc.ControlServiceServicer):
    """Wants a full report after each report."""

    def __init__(self) -> None:
        self.reports: queue.Queue[control_pb2.HeartbeatRequest] = queue.Queue()

    def Register(self, request: Any, context: Any) -> control_pb2.RegisterResponse:  # noqa: N802
        return control_pb2.RegisterResponse(version=PROTOCOL_VERSION, epoch=1, heartbeat_ms=60_000)

    def Heartbeat(self, requests: Any, context: Any) -> Any:  # noqa: N802
        for request in requests:
            self.reports.put(request)
            yield control_pb2.HeartbeatResponse(epoch=1, want_full=True)


@pytest.fixture
def manager() -> Iterator[tuple[Grumbler, str]]:
    server = grpc.server(ThreadPoolExecutor(4))
    grumbler = Grumbler()  # type: ignore[abstract]  # a node asks nothing else
    control_pb2_grpc.add_ControlServiceServicer_to_server(grumbler, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield grumbler, f"127.0.0.1:{port}"
    server.stop(0).wait(10)


def test_full_reports_in_vain_do_not_come_one_upon_the_other(
    manager: tuple[Grumbler, str], tmp_path: Path
) -> None:
    grumbler, address = manager
    node = Node(
        NodeSettings(
            node="n0",
            memory=1 << 20,
            runtime_dir=tmp_path / "run",
            grpc="",
            metrics="",
            manager=address,
        )
    )
    node.start()
    try:
        assert grumbler.reports.get(timeout=20).full
        with pytest.raises(queue.Empty):  # the next one is due in a minute
            grumbler.reports.get(timeout=0.3)
    finally:
        node.stop()
