"""A write that streams in: extents filled in order, hashed on the way, compared at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvfabric import checksums
from kvfabric.errors import Refused
from kvfabric_nodes.store.arena import Arena
from kvfabric_nodes.store.promises import Reservation


@dataclass(frozen=True, slots=True)
class Fill:
    """One key of a commit: where its bytes are, and what the client says of them."""

    index: int
    view: memoryview
    layers: int
    expected: Sequence[int]

    def wrong(self) -> str:
        """Why the bytes are not what the client says; empty: they are."""
        if checksums.matches(self.view, self.layers, self.expected):
            return ""
        return WRONG_CHECKSUM


WRONG_CHECKSUM = "its bytes do not have the checksums that came with them; write it again"


class Filling:
    """The extents of one reservation while a stream fills them."""

    def __init__(self, reservation: Reservation, arena: Arena, *, checked: bool) -> None:
        self._layers = reservation.layers
        self._checked = checked
        self._views = {
            index: arena.view(item.extent.segment, item.extent.offset, item.size_bytes)
            for index, item in sorted(reservation.items.items())
        }
        self._filled = dict.fromkeys(self._views, 0)
        self._sums: dict[int, list[int]] = {index: [] for index in self._views}

    @property
    def filled_bytes(self) -> int:
        return sum(self._filled.values())

    def place(self, index: int, offset: int, size_bytes: int) -> memoryview:
        """Where the next payload goes. Refused where it is out of order or too long."""
        view = self._views.get(index)
        if view is None or not size_bytes or offset != self._filled[index]:
            raise Refused(
                f"payload for key {index} at {offset}: send the granted keys' bytes in order"
            )
        if offset + size_bytes > len(view):
            raise Refused(f"key {index} is longer than the {len(view)} bytes reserved for it")
        return view[offset : offset + size_bytes]

    def filled(self, index: int, size_bytes: int) -> None:
        """The payload is in its place: hashes what it completes, while it is in the cache."""
        self._filled[index] += size_bytes
        if not self._checked:
            return
        view, sums = self._views[index], self._sums[index]
        parts = checksums.parts(len(view), self._layers)
        while len(sums) < len(parts) and parts[len(sums)][1] <= self._filled[index]:
            start, end = parts[len(sums)]
            sums.append(checksums.checksum(view[start:end]))

    def verdicts(self, expected: Sequence[int]) -> tuple[list[Fill], dict[int, str]]:
        """What came, and by index what is wrong with it. `expected`: the trailer's checksums."""
        fills: list[Fill] = []
        wrong: dict[int, str] = {}
        start = 0
        for index, view in self._views.items():
            count = len(checksums.parts(len(view), self._layers)) if self._checked else 0
            theirs = list(expected[start : start + count])
            start += count
            fills.append(Fill(index, view, self._layers, theirs))
            if self._filled[index] != len(view):
                wrong[index] = (
                    f"{self._filled[index]} bytes came of {len(view)} reserved; write it again"
                )
            elif theirs != self._sums[index]:
                wrong[index] = WRONG_CHECKSUM
        return fills, wrong
