"""Numbers as they lie in KV, as float32 and back. numpy has no bfloat16: its bits are the upper
half of a float32's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfabric.errors import Refused

STORED: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
}


def widened(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """float32 of an array of `STORED[dtype]`; exact."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float32, copy=False)


def narrowed(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """An array of `STORED[dtype]`, rounded to nearest even."""
    if dtype not in STORED:
        raise Refused(f"dtype {dtype!r} is none of {', '.join(STORED)}")
    if dtype != "bfloat16":
        return values.astype(STORED[dtype], copy=False)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = np.uint16(0x7FC0)  # rounding must not turn a NaN into an infinity
    return np.where(np.isnan(values), quiet, rounded.astype(np.uint16))
