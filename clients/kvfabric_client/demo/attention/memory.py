"""How much resident memory this process has come to need, by the kernel's own high-water mark."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # see proc(5)


class Growth:
    """Since it was made. What was freed before is given back first, so that nothing new hides in
    it; whatever comes later counts, intermediate results as well as KV."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text(RESET_PEAK)
        self._base_bytes = _status("VmRSS")

    @property
    def peak_bytes(self) -> int:
        return _status("VmHWM") - self._base_bytes


def _status(name: str) -> int:
    lines = STATUS.read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10
