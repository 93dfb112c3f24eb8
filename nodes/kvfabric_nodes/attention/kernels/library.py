"""The library in C, whose sources are in `native/`: its functions, and the structures they take."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from kvfabric_nodes.attention.kernels import Work

log = structlog.get_logger(__name__)

LIBRARY = Path(__file__).parent / "native" / "libkvfabric_attend.so"

# As attend.h numbers them.
ELEMENTS = {"float32": 0, "bfloat16": 1, "float16": 2}
BEST, LEVELS = 0, {"base": 1, "avx2": 2, "avx512": 3, "amx": 4}
OK, NO_MEMORY = 0, 1

_int64, _int32, _float, _pointer = (
    ctypes.c_int64,
    ctypes.c_int32,
    ctypes.c_float,
    ctypes.c_void_p,
)


class Call(ctypes.Structure):
    """`attend_call` of attend.h."""

    _fields_ = (
        ("pieces", _int64),
        ("keys", _pointer),
        ("values", _pointer),
        ("tokens", _pointer),
        ("first", _pointer),
        ("offset", _int64),
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


class Prepared(ctypes.Structure):
    """`prepared` of prepared.h."""

    _fields_ = (
        ("call", Call),
        ("owner", _int64),
        ("until_ns", _int64),
        ("layers", _int64),
        ("layer_bytes", _int64),
        ("window", _int64),
        ("end", _int64),
        ("board", _pointer),
        ("cuts", _int64),
    )


class Counts(ctypes.Structure):
    """`prepared_counts` of prepared.h."""

    _fields_ = (
        ("calls", _int64),
        ("rows", _int64),
        ("read_bytes", _int64),
        ("kernel_ns", _int64),
        ("busy", _int64),
    )


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "kvfabric_attend": (ctypes.c_int, [ctypes.POINTER(Call)]),
    "kvfabric_attend_has": (ctypes.c_int, [ctypes.c_int]),
    "kvfabric_sizes": (None, [_pointer]),
    "kvfabric_table": (_pointer, []),
    "kvfabric_table_free": (None, [_pointer]),
    "kvfabric_prepare": (_int64, [_pointer, ctypes.POINTER(Prepared)]),
    "kvfabric_unprepare": (ctypes.c_int, [_pointer, _int64]),
    "kvfabric_fence": (None, []),
    "kvfabric_counts": (None, [_pointer, ctypes.POINTER(Counts)]),
    "kvfabric_turn_take": (None, [_pointer]),
    "kvfabric_turn_give": (None, [_pointer]),
    "kvfabric_serve": (ctypes.c_int, [_pointer, ctypes.c_int, _int64, _int64]),
}


@functools.cache
def library(path: Path = LIBRARY) -> ctypes.CDLL | None:
    """None where it is not installed or does not load; the log says why, once."""
    try:
        found = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
        _check_sizes(found)
    except (OSError, AttributeError) as error:
        log.warning("no native attention kernel: others serve", reason=str(error))
        return None
    return found


def _check_sizes(found: ctypes.CDLL) -> None:
    sizes = (_int64 * 3)()
    found.kvfabric_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(each) for each in (Call, Prepared, Counts)]:
        raise OSError("it was built from other sources; run `make setup`")


def call_of(work: Work, threads: int, level: int) -> tuple[Call, list[NDArray[Any]]]:
    """The call without its outputs, and the arrays that must be kept until it is over."""
    shape = work.shape
    columns = [np.ascontiguousarray(c) for c in (work.keys, work.values, work.tokens, work.first)]
    rows = [np.ascontiguousarray(a) for a in (work.queries, work.sight.lo, work.sight.hi)]
    call = Call(
        pieces=len(work.keys),
        key_token_bytes=shape.key_token_stride,
        key_head_bytes=shape.key_head_stride,
        value_token_bytes=shape.value_token_stride,
        value_head_bytes=shape.value_head_stride,
        rows=work.rows,
        sinks=work.sight.sinks,
        element=ELEMENTS[shape.dtype],
        q_element=ELEMENTS[work.query_dtype],
        heads=work.query_heads,
        kv_heads=shape.kv_heads,
        key_dim=shape.key_dim,
        value_dim=shape.value_dim,
        scale=work.scale,
        softcap=work.softcap,
        threads=threads,
        level=level,
    )
    call.keys, call.values, call.tokens, call.first = map(address, columns)
    call.q, call.lo, call.hi = map(address, rows)
    return call, [*columns, *rows]


def address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)
