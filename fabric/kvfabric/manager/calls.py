"""What every group of ControlService's calls stands on: the core, its lock, clock and store."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import grpc

from kvfabric import logs
from kvfabric.clock import Clock
from kvfabric.errors import FabricError
from kvfabric.grpc_codes import code_of, metadata_of
from kvfabric.manager.core import ManagerCore
from kvfabric.manager.epoch import FencedStore
from kvfabric.metrics import Metrics

log = logs.logger(part="manager")


class Calls:
    """A group of calls. `_lock` guards `_core` and the metrics' values; never do I/O under it."""

    def __init__(
        self, core: ManagerCore, epoch: int, clock: Clock, metrics: Metrics, store: FencedStore
    ) -> None:
        self._core = core
        self._epoch = epoch
        self._clock = clock
        self._metrics = metrics
        self._store = store
        self._lock = threading.Lock()


@contextlib.contextmanager
def translated(context: Any) -> Iterator[None]:
    """A fabric's error becomes the call's status, with its text."""
    try:
        yield
    except FabricError as error:
        code = code_of(error)
        if code is grpc.StatusCode.INTERNAL:
            log.exception("call failed")
        context.set_trailing_metadata(metadata_of(error))
        context.abort(code, str(error))
