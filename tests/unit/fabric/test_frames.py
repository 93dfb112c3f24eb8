"""Frames are those of proto/vectors.json, however their bytes arrive."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfabric.errors import Refused
from kvfabric.rpc.v1 import wire_pb2
from kvfabric.wire import frames


def test_frames_are_those_of_the_vectors(vectors: dict[str, Any]) -> None:
    for case in vectors["frames"]:
        raw, payload = bytes.fromhex(case["frame"]), bytes.fromhex(case["payload"])
        header_bytes, payload_bytes = frames.lengths(raw)
        header = raw[frames.PREFIX.size :][:header_bytes]

        assert header.hex() == case["header"]
        assert payload_bytes == len(payload)
        assert frames.pack(frames.parse(header), len(payload)) + payload == raw, case["what"]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.lists(st.integers(1, 9)))
def test_frames_arrive_whole_however_they_are_cut(ids: list[int], cuts: list[int]) -> None:
    sent = [wire_pb2.Frame(id=i) for i in ids]
    for frame in sent:
        frame.match_request.keys.append(bytes(frame.id))
    stream = b"".join(frames.pack(frame) for frame in sent)

    inbox, arrived = frames.Inbox(), []
    for cut in [*cuts, len(stream)]:
        arrived += list(inbox.feed(stream[:cut]))
        stream = stream[cut:]

    assert arrived == sent
    assert not inbox


@pytest.mark.parametrize(
    "prefix",
    [
        frames.PREFIX.pack(0, 0),
        frames.PREFIX.pack(frames.MAX_HEADER_BYTES + 1, 0),
        frames.PREFIX.pack(1, frames.MAX_PAYLOAD_BYTES + 1),
        b"GET / HT",
    ],
)
def test_a_prefix_over_the_limits_is_refused_before_anything_is_read(prefix: bytes) -> None:
    with pytest.raises(Refused, match="does not speak this protocol"):
        list(frames.Inbox().feed(prefix))


def test_a_header_that_is_not_one_is_refused() -> None:
    garbage = b"\xff" * 16
    with pytest.raises(Refused, match="cannot be parsed"):
        list(frames.Inbox().feed(frames.PREFIX.pack(len(garbage), 0) + garbage))


def test_payload_on_a_connection_for_calls_is_refused() -> None:
    raw = frames.pack(wire_pb2.Frame(id=1), payload_bytes=4)
    with pytest.raises(Refused, match="bulk"):
        list(frames.Inbox().feed(raw + b"data"))


def test_what_came_before_garbage_is_still_answered() -> None:
    good = frames.pack(wire_pb2.Frame(id=7))
    arriving = frames.Inbox().feed(good + frames.PREFIX.pack(0, 0))
    assert next(arriving).id == 7
    with pytest.raises(Refused, match="does not speak this protocol"):
        next(arriving)


def test_a_batch_that_is_too_large_for_a_frame_is_refused_with_the_remedy() -> None:
    frame = wire_pb2.Frame(id=1)
    frame.match_request.keys.extend([bytes(32)] * 40_000)
    with pytest.raises(Refused, match="use smaller batches"):
        frames.pack(frame)
