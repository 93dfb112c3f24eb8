"""The limits that proto/README.md tells are those in force."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvfabric.wire import frames
from kvfabric_nodes.sequences import calls as sequence_calls
from kvfabric_nodes.sequences import cuts as sequence_cuts
from kvfabric_nodes.sequences import group_calls, steps
from kvfabric_nodes.sequences.core import SequenceLimits
from kvfabric_nodes.sequences.groups import GroupLimits
from kvfabric_nodes.sequences.states import StateLimits
from kvfabric_nodes.serving import grpc_service, handler, server

SPECIFICATION = Path(__file__).parents[3] / "proto" / "README.md"
MIB = 1 << 20
SEQUENCES = SequenceLimits()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("layers of a shard", f"{handler.MAX_LAYERS:,}"),
        ("namespaces of a session", f"{handler.MAX_NAMESPACES:,}"),
        ("segments of one `map_request`", f"{server.MAX_MAP_SEGMENTS}"),
        ("reasons in one answer; further refused keys have none", f"{handler.MAX_REASONS}"),
        (
            "connections, of these for bulk, and for prepared queries",
            f"{server.MAX_CONNECTIONS:,}, {server.MAX_THREADS} and {server.MAX_THREADS}",
        ),
        ("gRPC sessions", f"{grpc_service.MAX_SESSIONS:,}"),
        ("from a connection to its Hello", f"{server.HELLO_TIMEOUT_S:.0f} s"),
        ("from a frame's first byte to its last", f"{server.FRAME_TIMEOUT_S:.0f} s"),
        (
            "calls of a connection that wait for the manager, for room or for checksums",
            f"{server.MAX_WAITING_CALLS}",
        ),
        (
            "sequences of a node, and of these written by a session",
            f"{SEQUENCES.sequences:,} and {SEQUENCES.sequences_of_session:,}",
        ),
        ("sealed blocks of a sequence", f"{SEQUENCES.blocks:,}"),
        ("open blocks of a sequence", f"{SEQUENCES.tails}"),
        (
            "tentative forks of a sequence, and their open blocks in all",
            f"{SEQUENCES.forks} and {SEQUENCES.tentative_blocks}",
        ),
        (
            "pieces of an append, and its payload",
            f"{sequence_calls.MAX_APPEND_PIECES:,} and {sequence_calls.MAX_APPEND_BYTES >> 10} KiB",
        ),
        ("groups of a node", f"{GroupLimits().groups:,}"),
        ("life of a group", f"{GroupLimits().life_s / 3600:.0f} h"),
        (
            "states of a node, and of these of a namespace",
            f"{StateLimits().states:,} and {StateLimits().states_of_namespace:,}",
        ),
        ("steps in one report", f"{steps.REPORTED_STEPS:,}"),
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
    assert f"at most {sequence_calls.DESCRIBED_BLOCKS:,}, and `blocks` in all" in text
    assert f"both for at most {sequence_cuts.CUT_WAIT_S:.0f} s" in text
    assert f"is fetched first, for up to {group_calls.FETCH_S:.0f} s" in text
    assert f"`life_ms` (0: {group_calls.DEFAULT_LIFE_S / 60:.0f} minutes)" in text
    assert f"silent for {grpc_service.SESSION_SILENCE_S / 60:.0f} minutes ends" in text
