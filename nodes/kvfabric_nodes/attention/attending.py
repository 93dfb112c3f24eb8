"""Attends as jobs, and the computing of those that are taken up together.

Runs in the engine's thread: it reads what the jobs hold, and no books.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvfabric.attention.merge import Partial, combine
from kvfabric_nodes.attention.asked import Asked, Options, work
from kvfabric_nodes.attention.kernels.choice import Computed, Kernels
from kvfabric_nodes.attention.stacking import stacks
from kvfabric_nodes.store.extents import Extent


@dataclass(slots=True, eq=False)
class Attend:
    """One call: its queries, and what comes of them."""

    options: Options
    asked: Sequence[Asked]
    parts: list[Partial] = field(default_factory=list)  # of each query
    kernel: str = ""
    kernel_s: float = 0.0
    stacked: int = 0  # queries that shared its kernel calls
    read_bytes: int = 0

    @property
    def extents(self) -> list[Extent]:
        """What lies here of what is asked for."""
        if len(self.asked) == 1:
            return self.asked[0].here.extents
        return [extent for one in self.asked for extent in one.here.extents]

    @property
    def outputs(self) -> bytes:
        return b"".join(part.o.data for part in self.parts)

    @property
    def lse(self) -> bytes:
        return b"".join(part.lse.data for part in self.parts)

    def add(self, done: Computed, queries: int) -> None:
        """A kernel call that so many queries shared."""
        self.kernel = done.kernel
        self.kernel_s += done.seconds
        self.read_bytes += done.read_bytes
        self.stacked = max(self.stacked, queries)


def compute(attends: Sequence[Attend], kernels: Kernels) -> None:
    """All have the same options. What several of their queries have in common is read once."""
    options = attends[0].options
    queries = [(attend, one) for attend in attends for one in attend.asked]
    if len(queries) == 1 and len(queries[0][1].here.pieces):
        _alone(*queries[0], kernels)
    else:
        _stacked(options, queries, kernels)


def _alone(attend: Attend, one: Asked, kernels: Kernels) -> None:
    done = kernels.attend(work(attend.options, [one], one.here.pieces))
    attend.parts.append(done.partial)
    attend.add(done, 1)


def _stacked(options: Options, queries: Sequence[tuple[Attend, Asked]], kernels: Kernels) -> None:
    parts: list[list[Partial]] = [[] for _ in queries]
    for stack in stacks([one.here.pieces for _, one in queries]):
        rows = [queries[i][1] for i in stack.queries]
        job = work(options, rows, stack.pieces)
        done = kernels.attend(job)
        at = 0
        for index, one in zip(stack.queries, rows, strict=True):
            end = at + len(one.vectors)
            parts[index].append(Partial(done.partial.o[at:end], done.partial.lse[at:end]))
            at = end
        for attend in dict.fromkeys(queries[i][0] for i in stack.queries):
            attend.add(done, len(stack.queries))
    for (attend, one), found in zip(queries, parts, strict=True):
        attend.parts.append(combine(found) if found else _nothing(options, one))


def _nothing(options: Options, one: Asked) -> Partial:
    rows = (len(one.vectors), options.query_heads)
    return Partial(
        np.zeros((*rows, options.shape.value_dim), np.float32),
        np.full(rows, -np.inf, np.float32),
    )
