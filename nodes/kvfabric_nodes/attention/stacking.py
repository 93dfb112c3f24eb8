"""Which queries are attended together over which pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvfabric_nodes.attention.pieces import Pieces


@dataclass(frozen=True, slots=True)
class Stack:
    """Queries, by index, all of whose rows are attended over these pieces."""

    queries: list[int]
    pieces: Pieces


def stacks(pieces: Sequence[Pieces]) -> list[Stack]:
    """Of each query's pieces every one in exactly one stack."""
    return [Stack([index], one) for index, one in enumerate(pieces) if one.extents]
