"""Which queries are attended together over which pieces: what several have in common, of one
request or of many, is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvfabric_nodes.attention.pieces import Longs, Pieces


@dataclass(frozen=True, slots=True)
class Stack:
    """Queries, by index, all of whose rows are attended over these pieces."""

    queries: list[int]
    pieces: Pieces


def stacks(pieces: Sequence[Pieces]) -> list[Stack]:
    """`pieces`: of each query. Of these every one is in exactly one stack, with all the queries
    that have the very same piece."""
    if len(pieces) == 1:
        return [Stack([0], pieces[0])] if len(pieces[0]) else []
    everyones = Pieces(
        np.concatenate([one.address for one in pieces]),
        np.concatenate([one.skipped for one in pieces]),
        np.concatenate([one.first for one in pieces]),
        np.concatenate([one.end for one in pieces]),
    )
    owners = np.repeat(np.arange(len(pieces)), [len(one) for one in pieces])
    order, runs = _runs(everyones)
    if len(runs) == len(owners):  # nothing in common
        return [Stack([index], one) for index, one in enumerate(pieces) if len(one)]
    sharers, examples = owners[order], order[runs]
    found: dict[bytes, list[int]] = {}
    for start, end, example in zip(
        runs.tolist(), [*runs[1:].tolist(), len(order)], examples.tolist(), strict=True
    ):
        found.setdefault(sharers[start:end].tobytes(), []).append(example)
    made = [
        Stack(np.frombuffer(queries, owners.dtype).tolist(), everyones.take(sorted(index)))
        for queries, index in found.items()
    ]
    return sorted(made, key=lambda stack: (-len(stack.queries), stack.queries))


def _runs(pieces: Pieces) -> tuple[Longs, Longs]:
    """An order in which equal pieces are neighbours, and where in it each other one begins."""
    columns = (pieces.end, pieces.first, pieces.skipped, pieces.address)
    order = np.lexsort(columns)
    differs = np.zeros(len(order), bool)
    differs[:1] = True
    for column in columns:
        differs[1:] |= np.diff(column[order]) != 0
    return order, np.flatnonzero(differs)
