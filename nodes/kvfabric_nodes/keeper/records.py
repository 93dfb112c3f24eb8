"""What the keeper's table holds: the node's shape, a record per sealed shard and per guest.

The keeper does not look into them. A record of another shape is refused by `decode`, so that
an rManager of another version keeps nothing rather than something wrong. Records of shards are
packed in operations.py.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from kvfabric.types import DIGEST_BYTES, Key, NamespaceId

FORMAT = 1
TOKEN_BYTES = 16

_SHAPE_KEY = b"shape"
_SHAPE = struct.Struct(">HQQ")  # format, segments, bytes of each
SLOT_KEY = struct.Struct(">cIQ")  # "s", segment, offset
_GUEST_KEY = struct.Struct(f">c{TOKEN_BYTES}sII")  # "g", session, segment, process
_GUEST = struct.Struct(">Q")  # start of the process, in clock ticks
# size, slot, generation, layers, expiry, flags, lengths of tenant and owner, checksums; then
# namespace, key, parent if it continues one, the checksums, tenant, owner
SHARD = struct.Struct(">QQIIdBHHI")
PINNED, CONTINUES, EXPIRES = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a node's memory. Another one adopts nothing."""

    segments: int
    segment_bytes: int


@dataclass(frozen=True, slots=True)
class Record:
    """A sealed shard and where it lies."""

    segment: int
    offset: int
    slot_bytes: int
    generation: int
    namespace: NamespaceId
    key: Key
    parent: Key | None
    tenant: str
    owner: str
    size_bytes: int
    layers: int
    checksums: tuple[int, ...]
    expires_at_s: float | None  # by the wall clock: monotonic ones end with their process
    pinned: bool


@dataclass(frozen=True, slots=True)
class Guest:
    """A process that a segment was given to, for one session."""

    token: bytes
    segment: int
    pid: int  # 0: not visible from here
    started_ticks: int


@dataclass(frozen=True, slots=True)
class State:
    """All that a keeper's table says."""

    shape: Shape | None
    shards: list[Record]  # in the order in which they were sealed
    guests: list[Guest]
    unreadable: int


def slot_key(segment: int, offset: int) -> bytes:
    return SLOT_KEY.pack(b"s", segment, offset)


def guest_key(guest: Guest) -> bytes:
    return _GUEST_KEY.pack(b"g", guest.token, guest.segment, guest.pid)


def encode_guest(guest: Guest) -> bytes:
    return _GUEST.pack(guest.started_ticks)


def encode_shape(shape: Shape) -> tuple[bytes, bytes]:
    return _SHAPE_KEY, _SHAPE.pack(FORMAT, shape.segments, shape.segment_bytes)


def decode(key: bytes, data: bytes) -> Record:
    """ValueError where it is no record."""
    try:
        _, segment, offset = SLOT_KEY.unpack(key)
        head = SHARD.unpack_from(data)
        size, slot, generation, layers, expires_at_s, flags, tenant, owner, sums = head
        rest = _Rest(data, SHARD.size)
        namespace, own = rest.take(DIGEST_BYTES), rest.take(DIGEST_BYTES)
        parent = rest.take(DIGEST_BYTES) if flags & CONTINUES else None
        checksums = struct.unpack(f">{sums}Q", rest.take(8 * sums))
        names = rest.take(tenant).decode(), rest.take(owner).decode()
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"no record of a shard: {error}") from error
    if rest.left:
        raise ValueError(f"{rest.left} bytes behind the record of a shard")
    return Record(
        segment,
        offset,
        slot,
        generation,
        NamespaceId(namespace),
        Key(own),
        None if parent is None else Key(parent),
        *names,
        size,
        layers,
        checksums,
        expires_at_s if flags & EXPIRES else None,
        bool(flags & PINNED),
    )


def read(table: Mapping[bytes, bytes]) -> State:
    """What the table says, as far as it can be read. No shape where a guest cannot be read:
    nothing is known to be safe from it then.
    """
    shape: Shape | None = None
    known = True
    shards: list[Record] = []
    guests: list[Guest] = []
    unreadable = 0
    for key, data in table.items():
        try:
            if key == _SHAPE_KEY:
                version, segments, segment_bytes = _SHAPE.unpack(data)
                shape = Shape(segments, segment_bytes) if version == FORMAT else None
            elif key[:1] == b"g":
                _, token, segment, pid = _GUEST_KEY.unpack(key)
                guests.append(Guest(token, segment, pid, *_GUEST.unpack(data)))
            else:
                shards.append(decode(key, data))
        except (ValueError, struct.error):
            unreadable += 1
            known = known and key[:1] != b"g"
    return State(shape if known else None, shards, guests, unreadable)


class _Rest:
    """The bytes behind a record's head."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data = data
        self._start = start

    @property
    def left(self) -> int:
        return len(self._data) - self._start

    def take(self, size_bytes: int) -> bytes:
        if size_bytes > self.left:
            raise struct.error(f"{size_bytes} bytes wanted, {self.left} are left")
        piece = self._data[self._start : self._start + size_bytes]
        self._start += size_bytes
        return piece
