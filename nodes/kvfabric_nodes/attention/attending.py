"""Attends as jobs, and the computing of those that are taken up together.

Runs in the engine's thread: it reads what the jobs hold, and no books.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention.merge import Partial, combine
from kvfabric_nodes.attention.asked import Asked, Options, work
from kvfabric_nodes.attention.kernels.choice import Kernels
from kvfabric_nodes.attention.stacking import stacks


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
    def outputs(self) -> NDArray[np.float32]:
        return np.concatenate([part.o for part in self.parts])

    @property
    def lse(self) -> NDArray[np.float32]:
        return np.concatenate([part.lse for part in self.parts])


def compute(attends: Sequence[Attend], kernels: Kernels) -> None:
    """All have the same options. What several of their queries have in common is read once."""
    options = attends[0].options
    queries = [(attend, one) for attend in attends for one in attend.asked]
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
            attend.kernel = done.kernel
            attend.kernel_s += done.seconds
            attend.read_bytes += done.read_bytes
            attend.stacked = max(attend.stacked, len(stack.queries))
    for (attend, one), found in zip(queries, parts, strict=True):
        attend.parts.append(combine(found) if found else _nothing(options, one))


def _nothing(options: Options, one: Asked) -> Partial:
    rows = (len(one.vectors), options.query_heads)
    return Partial(
        np.zeros((*rows, options.shape.value_dim), np.float32),
        np.full(rows, -np.inf, np.float32),
    )
