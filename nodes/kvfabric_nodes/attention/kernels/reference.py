"""The plainest kernel: numpy, everywhere and for everything. Slow; the last choice."""

from __future__ import annotations

import numpy as np

from kvfabric.attention import oracle
from kvfabric.attention.floats import widened
from kvfabric.attention.merge import Partial
from kvfabric_nodes.attention.kernels import Work
from kvfabric_nodes.attention.kernels.memory import gathered


class ReferenceKernel:
    """The oracle over gathered pieces. See `Kernel`."""

    name = "reference"

    def refuses(self, work: Work) -> str:
        return ""

    def attend(self, work: Work) -> Partial:
        shape = work.shape
        positions = [
            np.arange(first, first + count)
            for first, count in zip(work.first, work.tokens, strict=True)
        ]
        return oracle.attend(
            widened(work.queries, work.query_dtype),
            gathered(shape, work.keys, work.tokens, values=False),
            gathered(shape, work.values, work.tokens, values=True),
            np.concatenate([np.empty(0, np.int64), *positions]),
            work.sight,
            work.scale,
            work.softcap,
        )
