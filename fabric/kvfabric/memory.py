"""Faulting shared memory in ahead of its use, without the GIL (Linux 5.14)."""

from __future__ import annotations

import ctypes
import mmap
import os

_POPULATE_READ, _POPULATE_WRITE = 22, 23  # not in Python's mmap module yet

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def populate(mapped: mmap.mmap, start: int, size_bytes: int, *, write: bool) -> None:
    """Faults pages in; what they hold stays. Raises OSError.

    `write` allocates the pages that nobody has touched; without it, and four times as
    fast, the pages that exist are entered into this process's page table.
    """
    # Exporting the buffer keeps the mapping alive meanwhile, should another thread close it.
    first = ctypes.c_char.from_buffer(mapped, start)
    advice = _POPULATE_WRITE if write else _POPULATE_READ
    if _libc.madvise(ctypes.addressof(first), size_bytes, advice):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
