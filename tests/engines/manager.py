"""A manager in this process, that nodes of engines' tests register with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvfabric.manager.service import ManagerServer
from kvfabric.manager.settings import ManagerSettings


@contextmanager
def serving(folder: Path, *, heartbeat_ms: int, silence_ms: int) -> Iterator[ManagerServer]:
    settings = ManagerSettings(
        listen="127.0.0.1:0",
        runtime_dir=str(folder / "manager"),
        heartbeat_ms=heartbeat_ms,
        silence_ms=silence_ms,
    )
    server = ManagerServer(settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()
