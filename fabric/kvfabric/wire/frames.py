"""One frame: [u32 header bytes][u32 payload bytes][header: protobuf Frame][payload].

Little-endian. Payloads never pass through protobuf: they are received straight into
the place where they belong, and sent from it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from google.protobuf.message import DecodeError

from kvfabric.errors import Refused
from kvfabric.rpc.v1 import wire_pb2

PREFIX = struct.Struct("<II")
MAX_HEADER_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 1 << 20


def pack(frame: wire_pb2.Frame, payload_bytes: int = 0) -> bytes:
    """Prefix and header; `payload_bytes` of payload must be sent right behind them."""
    header = frame.SerializeToString()
    if len(header) > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise Refused(
            f"a frame of {len(header)} + {payload_bytes} bytes is over the limit of "
            f"{MAX_HEADER_BYTES} + {MAX_PAYLOAD_BYTES}; use smaller batches"
        )
    return PREFIX.pack(len(header), payload_bytes) + header


def lengths(prefix: bytes | bytearray | memoryview) -> tuple[int, int]:
    """(header bytes, payload bytes). Refused where they are over the limits."""
    header_bytes, payload_bytes = PREFIX.unpack_from(prefix)
    if not 0 < header_bytes <= MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise Refused(
            f"a frame says {header_bytes} + {payload_bytes} bytes, over the limit of "
            f"{MAX_HEADER_BYTES} + {MAX_PAYLOAD_BYTES}: the peer does not speak this protocol"
        )
    return header_bytes, payload_bytes


def parse(header: bytes | bytearray | memoryview) -> wire_pb2.Frame:
    """The header of a frame. Refused where it is not one."""
    try:
        return wire_pb2.Frame.FromString(bytes(header))
    except DecodeError as error:
        raise Refused(f"the header of a frame cannot be parsed: {error}") from error


class Inbox:
    """Frames without payload out of a stream of bytes that arrive as they like."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def __bool__(self) -> bool:
        """Whether part of a frame is waiting for the rest."""
        return bool(self._pending)

    def feed(self, data: bytes) -> Iterator[wire_pb2.Frame]:
        """Every frame that `data` completes. Refused where the peer sends something else."""
        pending = self._pending
        pending += data
        start = 0
        try:
            while len(pending) - start >= PREFIX.size:
                header_bytes, payload_bytes = lengths(pending[start : start + PREFIX.size])
                if payload_bytes:
                    raise Refused("payload on a connection for calls; open one with 'bulk'")
                end = start + PREFIX.size + header_bytes
                if end > len(pending):
                    break
                header = bytes(pending[start + PREFIX.size : end])
                start = end
                yield parse(header)
        finally:
            del pending[:start]
