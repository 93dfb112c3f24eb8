"""Anything that holds contiguous bytes as a flat array of them, without a copy.

numpy arrays, memoryviews, bytes, and torch tensors in CPU memory (torch itself is not
imported: a tensor tells its address). Copies go through numpy, which releases the GIL.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvfabric import checksums
from kvfabric.errors import Refused

Bytes = NDArray[np.uint8]

# Copied, then hashed, at once: small enough for a core's cache. Every copy lets the GIL go and
# has to win it back, which a thread beside a busy engine should not do for each small layer.
STEP_BYTES = 256 << 10


def flat(buffer: Any, *, writable: bool = False) -> Bytes:
    """The buffer's bytes as a 1-D uint8 array over the same memory.

    The caller keeps `buffer` alive. Refused where it is not contiguous CPU memory, or
    read-only although it is to be written.
    """
    if hasattr(buffer, "data_ptr"):
        return _flat_tensor(buffer)
    try:
        if isinstance(buffer, np.ndarray):
            array: Bytes = buffer.reshape(-1).view(np.uint8)
            if not buffer.flags.c_contiguous:
                raise BufferError("it is not contiguous")
        else:
            array = np.frombuffer(memoryview(buffer).cast("B"), dtype=np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise Refused(
            f"a {type(buffer).__name__} cannot be moved: {error}; give contiguous bytes"
        ) from error
    if writable and not array.flags.writeable:
        raise Refused(f"a read-only {type(buffer).__name__} cannot be loaded into; copy it first")
    return array


def _flat_tensor(tensor: Any) -> Bytes:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise Refused(
            f"a tensor on {tensor.device} with strides {tensor.stride()} cannot be moved; "
            "call .cpu().contiguous() first"
        )
    size_bytes = tensor.numel() * tensor.element_size()
    memory = (ctypes.c_ubyte * size_bytes).from_address(tensor.data_ptr())
    return np.frombuffer(memory, dtype=np.uint8)


class Pieces:
    """One shard's bytes in one or several buffers, to be moved part by part."""

    __slots__ = ("arrays", "size_bytes")

    def __init__(self, buffers: Any, *, writable: bool = False) -> None:
        several = isinstance(buffers, (list, tuple))
        self.arrays = [flat(b, writable=writable) for b in (buffers if several else [buffers])]
        self.size_bytes = sum(len(array) for array in self.arrays)

    def slices(self, start: int, end: int) -> Iterator[Bytes]:
        """The bytes from `start` to `end`, in order, as slices of the buffers."""
        for array in self.arrays:
            if start >= end:
                return
            if start < len(array):
                yield array[start:end]
            start = max(0, start - len(array))
            end -= len(array)

    def store(self, place: memoryview, layers: int, *, checked: bool) -> list[int]:
        """Copies all into `place`; answers the checksums of what was copied.

        What is hashed is the source, so that a bit that flips on the way shows; right
        after it was copied, while the cache still has it.
        """
        target = np.frombuffer(place, dtype=np.uint8)
        sums = PartSums(self, layers)
        for start in range(0, self.size_bytes, STEP_BYTES):
            end = min(start + STEP_BYTES, self.size_bytes)
            at = start
            for piece in self.slices(start, end):
                np.copyto(target[at : at + len(piece)], piece)
                at += len(piece)
            if checked:
                sums.reach(end)
        return sums.sums

    def load(self, place: memoryview, layers: int, expected: Sequence[int]) -> bool:
        """Copies all from `place`; False where a checksum of what arrived is wrong."""
        source = np.frombuffer(place, dtype=np.uint8)
        intact = True
        for number, (start, _, pieces) in enumerate(self.cut(layers or 1)):
            for piece in pieces:
                np.copyto(piece, source[start : start + len(piece)])
                start += len(piece)
            if expected and _checksum(pieces) != expected[number]:
                intact = False
        return intact

    def cut(self, layers: int) -> Iterator[tuple[int, int, list[Bytes]]]:
        """(start, end, slices) of every layer part; one walk over the buffers."""
        array_index, array_start = 0, 0
        for start, end in checksums.parts(self.size_bytes, layers):
            pieces: list[Bytes] = []
            at = start
            while at < end:
                array = self.arrays[array_index]
                piece = array[at - array_start : end - array_start]
                pieces.append(piece)
                at += len(piece)
                if at - array_start == len(array):
                    array_start += len(array)
                    array_index += 1
            yield start, end, pieces


class PartSums:
    """The checksums of a shard's layer parts, each taken as soon as its bytes have passed.

    The cache still has them then: at the end they would have to be read once more.
    """

    def __init__(self, pieces: Pieces, layers: int) -> None:
        self.sums: list[int] = []
        self._parts = pieces.cut(layers or 1)
        self._part = next(self._parts, None)

    def reach(self, end: int) -> None:
        """The shard's bytes up to `end` have passed."""
        while self._part is not None and self._part[1] <= end:
            self.sums.append(_checksum(self._part[2]))
            self._part = next(self._parts, None)


def _checksum(pieces: list[Bytes]) -> int:
    if len(pieces) == 1:
        return checksums.checksum(pieces[0].data)
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece.data)
    return digest.intdigest()
