"""What can be moved: anything with contiguous bytes in CPU memory, without importing torch."""

from __future__ import annotations

import array
import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfabric import checksums
from kvfabric.errors import Refused
from kvfabric.types import Status
from kvfabric_client import Room
from kvfabric_client.buffers import PartSums, Pieces, flat

from .conftest import key, payload

SIZE_BYTES = 96


@pytest.mark.parametrize(
    "buffer",
    [
        bytes(range(SIZE_BYTES)),
        bytearray(range(SIZE_BYTES)),
        memoryview(bytes(range(SIZE_BYTES))),
        array.array("I", range(24)),
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.arange(SIZE_BYTES, dtype=np.int8),
        torch.arange(24, dtype=torch.float32).reshape(4, 6),
        torch.arange(48, dtype=torch.bfloat16),
        torch.arange(24, dtype=torch.float32, requires_grad=True),
        torch.arange(100, dtype=torch.uint8)[4:],
    ],
    ids=lambda buffer: f"{type(buffer).__name__}-{getattr(buffer, 'dtype', '')}",
)
def test_contiguous_bytes_of_any_kind_are_put_and_read_back(buffer: Any, room: Room) -> None:
    assert len(flat(buffer)) == SIZE_BYTES
    assert room.put([key(1)], [buffer]) == [Status.OK]
    [copy] = room.get([key(1)])
    assert copy is not None
    assert bytes(copy) == bytes(flat(buffer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_a_tensor_is_loaded_in_place(dtype: torch.dtype, room: Room) -> None:
    source = torch.randn(64, 100).to(dtype)
    target = torch.zeros_like(source)
    room.put([key(1)], [source])
    assert room.get_into([key(1)], [target]) == [Status.OK]
    assert torch.equal(source, target)


@pytest.mark.parametrize(
    "buffer",
    [
        np.arange(24).reshape(4, 6)[:, 1:3],
        np.arange(24).reshape(4, 6).T,
        np.arange(24)[::-1],
        np.array([object()]),
        torch.arange(24).reshape(4, 6).t(),
        torch.empty(4, device="meta"),
        memoryview(bytes(10))[::2],
        "text",
        12,
        None,
    ],
    ids=lambda buffer: type(buffer).__name__,
)
def test_what_is_not_contiguous_memory_is_refused_before_anything_is_sent(buffer: Any) -> None:
    with pytest.raises(Refused, match="cannot be moved"):
        Pieces(buffer)


@pytest.mark.parametrize(
    "buffer", [b"bytes", memoryview(b"bytes"), np.frombuffer(b"bytes", np.uint8)]
)
def test_a_read_only_buffer_cannot_be_loaded_into(buffer: Any, room: Room) -> None:
    with pytest.raises(Refused, match="read-only"):
        room.get_into([key(1)], [buffer])


@pytest.mark.parametrize(
    "buffer", [b"", np.zeros(0), np.zeros((0, 4)), torch.zeros(0), [], [b""]], ids=repr
)
def test_nothing_at_all_is_refused_as_a_shard(buffer: Any, room: Room) -> None:
    with pytest.raises(Refused, match="0 bytes"):
        room.put([key(1)], [buffer])
    assert room.get_into([key(1)], [bytearray()]) == [Status.MISS]


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_pieces_are_gathered_and_scattered(room: Room, layers: int) -> None:
    whole = payload(0, 600_000)
    cuts = [0, 1, 1, 5000, 262_144, 262_145, 599_999, 600_000]
    pieces = [whole[a:b] for a, b in itertools.pairwise(cuts)]
    assert room.put([key(1)], [pieces], layers=layers) == [Status.OK]
    [copy] = room.get([key(1)])
    assert copy is not None
    assert np.array_equal(copy, whole)

    first, rest = torch.zeros(100_000, dtype=torch.uint8), np.zeros(500_000, np.uint8)
    assert room.get_into([key(1)], [(first, rest)]) == [Status.OK]
    assert np.array_equal(np.concatenate([first.numpy(), rest]), whole)


@given(
    st.lists(st.integers(0, 400_000), min_size=1, max_size=5).filter(sum),
    st.sampled_from([1, 2, 3, 7]),
)
def test_pieces_have_the_checksums_of_the_whole(sizes: list[int], layers: int) -> None:
    total = -(-sum(sizes) // layers) * layers
    sizes = [*sizes, total - sum(sizes)]
    whole = payload(1, total)
    starts = np.cumsum([0, *sizes])
    pieces = Pieces([whole[a:b] for a, b in itertools.pairwise(starts)])
    expected = checksums.checksums(whole.data, layers)

    stored = np.zeros(total, np.uint8)
    assert pieces.store(stored.data, layers, checked=True) == expected
    assert np.array_equal(stored, whole)

    target = Pieces([np.zeros(size, np.uint8) for size in sizes], writable=True)
    assert target.load(stored.data, layers, expected)
    assert np.array_equal(np.concatenate(target.arrays), whole)
    stored[total // 2] ^= 1
    assert not target.load(stored.data, layers, expected)

    passed = PartSums(pieces, layers)
    for end in range(0, total + 1, 1 << 17):
        passed.reach(end)
    passed.reach(total)
    assert passed.sums == expected
    assert b"".join(bytes(s) for s in pieces.slices(total // 3, total)) == bytes(
        whole[total // 3 :]
    )


def test_the_client_imports_no_torch() -> None:
    code = "import sys, kvfabric_client; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
