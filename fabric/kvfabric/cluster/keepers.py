"""Keepers that rManagers left behind, ended by `kvfabric down`: nobody is to come for the memory.

A keeper outlives its rManager on purpose, and waits for the next one. It ends at SIGTERM.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

SUFFIX = ".keeper"  # of their sockets in the runtime directory
CONNECT_S = 0.2
_UCRED = struct.Struct("3i")


def sockets(runtime_dir: Path) -> list[Path]:
    return sorted(runtime_dir.glob(f"*{SUFFIX}"))


def end(runtime_dir: Path, nodes: Iterable[str], deadline: float) -> None:
    """Ends those of these nodes on this machine, and waits for it until `deadline` (monotonic)."""
    for node in nodes:
        descriptor = _process_at(runtime_dir / f"{node}{SUFFIX}")
        if descriptor is None:
            continue
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        os.close(descriptor)


def _process_at(path: Path) -> int | None:
    """A pidfd of whoever listens there; the open connection keeps it from being another's."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(str(path))
            raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            return os.pidfd_open(_UCRED.unpack(raw)[0])
        except OSError:
            return None
