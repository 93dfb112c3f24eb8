"""What a keeper is told of sealed shards: an operation and the record in it, packed at once.

`records.decode` reads what it keeps of that.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

from kvfabric.types import DIGEST_BYTES, Key, NamespaceId
from kvfabric_nodes.keeper.process import HEADER, KEY_BYTES, Op
from kvfabric_nodes.keeper.records import CONTINUES, EXPIRES, PINNED, SHARD, SLOT_KEY

_DELETE = struct.Struct(HEADER.format + SLOT_KEY.format.removeprefix(">"))
_OP_PUT, _OP_DELETE = int(Op.PUT), int(Op.DELETE)  # packed much faster than what they stand for


def put(
    segment: int,
    offset: int,
    slot_bytes: int,
    generation: int,
    namespace: NamespaceId,
    key: Key,
    parent: Key | None,
    tenant: str,
    owner: str,
    size_bytes: int,
    layers: int,
    checksums: Sequence[int],
    expires_at_s: float | None,
    pinned: bool,
) -> bytes:
    """The operation that has a keeper keep such a record; struct.error for an endless owner.

    Packed at once, and without the record: it is done for every shard that is sealed.
    """
    flags = PINNED if pinned else 0
    if parent is not None:
        flags |= CONTINUES
    if expires_at_s is not None:
        flags |= EXPIRES
    link, first, second, count = parent or b"", tenant.encode(), owner.encode(), len(checksums)
    form, body_bytes = _operation(len(link), count, len(first), len(second))
    return form.pack(
        _OP_PUT,
        body_bytes,
        SLOT_KEY.size,
        b"s",
        segment,
        offset,
        size_bytes,
        slot_bytes,
        generation,
        layers,
        expires_at_s or 0.0,
        flags,
        len(first),
        len(second),
        count,
        namespace,
        key,
        link,
        *checksums,
        first,
        second,
    )


@lru_cache(maxsize=256)
def _operation(link: int, sums: int, tenant: int, owner: int) -> tuple[struct.Struct, int]:
    """How an operation with fields so long is packed, and the bytes of its body."""
    parts = (HEADER, KEY_BYTES, SLOT_KEY, SHARD)
    heads = "".join(part.format.removeprefix(">") for part in parts)
    rest = f"{DIGEST_BYTES}s{DIGEST_BYTES}s{link}s{sums}Q{tenant}s{owner}s"
    form = struct.Struct(f">{heads}{rest}")
    return form, form.size - HEADER.size


def delete(segment: int, offset: int) -> bytes:
    """The operation that ends it."""
    return _DELETE.pack(_OP_DELETE, SLOT_KEY.size, b"s", segment, offset)
