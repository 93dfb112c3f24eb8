"""The limits that proto/README.md tells are those in force."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvfabric.wire import frames
from kvfabric_nodes import grpc_service, handler, server

SPECIFICATION = Path(__file__).parents[3] / "proto" / "README.md"
MIB = 1 << 20


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("layers of a shard", f"{handler.MAX_LAYERS:,}"),
        ("namespaces of a session", f"{handler.MAX_NAMESPACES:,}"),
        ("segments of one `map_request`", f"{server.MAX_MAP_SEGMENTS}"),
        ("reasons in one answer; further refused keys have none", f"{handler.MAX_REASONS}"),
        (
            "connections, of these for bulk",
            f"{server.MAX_CONNECTIONS:,} and {server.MAX_BULK_CONNECTIONS}",
        ),
        ("gRPC sessions", f"{grpc_service.MAX_SESSIONS:,}"),
        ("from a connection to its Hello", f"{server.HELLO_TIMEOUT_S:.0f} s"),
        ("from a frame's first byte to its last", f"{server.FRAME_TIMEOUT_S:.0f} s"),
        (
            "calls of a connection that wait for the manager or for checksums",
            f"{server.MAX_WAITING_CALLS}",
        ),
        ("answers that a client has not fetched", f"{server.MAX_UNSENT_BYTES // MIB} MiB"),
    ],
)
def test_the_table_of_limits_is_true(what: str, said: str) -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", SPECIFICATION.read_text(), re.MULTILINE)
    assert dict(rows)[what] == said


def test_the_limits_of_a_frame_and_the_default_deadline_are_true() -> None:
    text = SPECIFICATION.read_text()
    assert f"The header is 1 to {frames.MAX_HEADER_BYTES:,} bytes" in text
    assert f"the payload 0 to {frames.MAX_PAYLOAD_BYTES:,}." in text
    assert f"0 means the default of {handler.DEFAULT_DEADLINE_S:.0f} s" in text
    assert f"silent for {grpc_service.SESSION_SILENCE_S / 60:.0f} minutes ends" in text
