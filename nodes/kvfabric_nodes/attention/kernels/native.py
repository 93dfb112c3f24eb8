"""The CPU kernel in C: every dtype, shape and mask, on the best instructions this CPU has.

Its sources lie in `native/`, where the build puts the library too (see hatch_build.py). It starts
threads of its own for a call and ends them with it; the GIL is free meanwhile.
"""

from __future__ import annotations

import ctypes
import os

import numpy as np

from kvfabric.attention.merge import Partial
from kvfabric_nodes.attention.kernels import Work
from kvfabric_nodes.attention.kernels.library import (
    BEST,
    LEVELS,
    LIBRARY,
    NO_MEMORY,
    OK,
    address,
    call_of,
    library,
)


def available() -> bool:
    """Whether this installation has the library; if not, the log says why, once."""
    return library() is not None


def levels() -> list[str]:
    """The ways to compute that this CPU has, the slowest first."""
    native = library()
    if native is None:
        return []
    return [name for name, number in LEVELS.items() if native.kvfabric_attend_has(number)]


class NativeKernel:
    """See `Kernel`. `threads` 0: as many as this process has CPUs; `level`: "" for the best.

    Products of bfloat16 and float16 are exact, sums are in float32. Where AMX is used, weights
    keep 2^-18 of themselves.
    """

    name = "native"

    def __init__(self, threads: int = 0, level: str = "") -> None:
        self._threads = threads or len(os.sched_getaffinity(0))
        self._level = LEVELS[level] if level else BEST

    def refuses(self, work: Work) -> str:
        return "" if available() else f"{LIBRARY.name} is not installed or does not load"

    def attend(self, work: Work) -> Partial:
        """MemoryError: some 4 MiB for each thread could not be had."""
        native = library()
        assert native is not None, "asked in spite of its refusal"
        o = np.empty((work.rows, work.query_heads, work.shape.value_dim), np.float32)
        lse = np.empty((work.rows, work.query_heads), np.float32)
        call, _kept = call_of(work, self._threads, self._level)
        call.o, call.lse = address(o), address(lse)
        status = native.kvfabric_attend(ctypes.byref(call))
        if status == NO_MEMORY:
            raise MemoryError("for the native attention kernel")
        assert status == OK, f"the CPU lacks level {self._level}"
        return Partial(o, lse)
