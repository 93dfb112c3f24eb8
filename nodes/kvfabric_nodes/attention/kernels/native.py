"""The CPU kernel in C: every dtype, shape and mask, on the best instructions this CPU has.

Its sources lie in `native/`, where the build puts the library too (see hatch_build.py). It starts
threads of its own for a call and ends them with it; the GIL is free meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import numpy as np
import structlog

from kvfabric.attention.merge import Partial
from kvfabric_nodes.attention.kernels import Array, Work

log = structlog.get_logger(__name__)

LIBRARY = Path(__file__).parent / "native" / "libkvfabric_attend.so"

# As attend.h numbers them.
_ELEMENTS = {"float32": 0, "bfloat16": 1, "float16": 2}
_BEST, LEVELS = 0, {"base": 1, "avx2": 2, "avx512": 3, "amx": 4}
_OK, _NO_MEMORY = 0, 1

_int64, _int32, _float, _pointer = (
    ctypes.c_int64,
    ctypes.c_int32,
    ctypes.c_float,
    ctypes.c_void_p,
)


class _Call(ctypes.Structure):
    """`attend_call` of attend.h."""

    _fields_ = (
        ("pieces", _int64),
        ("keys", _pointer),
        ("values", _pointer),
        ("tokens", _pointer),
        ("first", _pointer),
        ("key_token_bytes", _int64),
        ("key_head_bytes", _int64),
        ("value_token_bytes", _int64),
        ("value_head_bytes", _int64),
        ("rows", _int64),
        ("q", _pointer),
        ("lo", _pointer),
        ("hi", _pointer),
        ("sinks", _int64),
        ("element", _int32),
        ("q_element", _int32),
        ("heads", _int32),
        ("kv_heads", _int32),
        ("key_dim", _int32),
        ("value_dim", _int32),
        ("scale", _float),
        ("softcap", _float),
        ("threads", _int32),
        ("level", _int32),
        ("o", _pointer),
        ("lse", _pointer),
    )


@functools.cache
def _library(path: Path = LIBRARY) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("no native attention kernel: others serve", reason=str(error))
        return None
    library.kvfabric_attend.argtypes = (ctypes.POINTER(_Call),)
    return library


def available() -> bool:
    """Whether this installation has the library; if not, the log says why, once."""
    return _library() is not None


def levels() -> list[str]:
    """The ways to compute that this CPU has, the slowest first."""
    library = _library()
    if library is None:
        return []
    return [name for name, number in LEVELS.items() if library.kvfabric_attend_has(number)]


class NativeKernel:
    """See `Kernel`. `threads` 0: as many as this process has CPUs; `level`: "" for the best.

    Products of bfloat16 and float16 are exact, sums are in float32. Where AMX is used, weights
    keep 2^-18 of themselves.
    """

    name = "native"

    def __init__(self, threads: int = 0, level: str = "") -> None:
        self._threads = threads or len(os.sched_getaffinity(0))
        self._level = LEVELS[level] if level else _BEST

    def refuses(self, work: Work) -> str:
        return "" if available() else f"{LIBRARY.name} is not installed or does not load"

    def attend(self, work: Work) -> Partial:
        """MemoryError: some 4 MiB for each thread could not be had."""
        library = _library()
        assert library is not None, "asked in spite of its refusal"
        shape = work.shape
        o = np.empty((work.rows, work.query_heads, shape.value_dim), np.float32)
        lse = np.empty((work.rows, work.query_heads), np.float32)
        columns = (work.keys, work.values, work.tokens, work.first)
        arrays = [np.ascontiguousarray(column) for column in columns]  # kept until the call is over
        queries, lo, hi = (
            np.ascontiguousarray(a) for a in (work.queries, work.sight.lo, work.sight.hi)
        )
        call = _Call(
            len(work.keys),
            *(_address(array) for array in arrays),
            shape.key_token_stride,
            shape.key_head_stride,
            shape.value_token_stride,
            shape.value_head_stride,
            work.rows,
            _address(queries),
            _address(lo),
            _address(hi),
            work.sight.sinks,
            _ELEMENTS[shape.dtype],
            _ELEMENTS[work.query_dtype],
            work.query_heads,
            shape.kv_heads,
            shape.key_dim,
            shape.value_dim,
            work.scale,
            work.softcap,
            self._threads,
            self._level,
            _address(o),
            _address(lse),
        )
        status = library.kvfabric_attend(ctypes.byref(call))
        if status == _NO_MEMORY:
            raise MemoryError("for the native attention kernel")
        assert status == _OK, f"the CPU lacks level {self._level}"
        return Partial(o, lse)


def _address(array: Array) -> int:
    return array.ctypes.data
