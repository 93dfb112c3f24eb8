"""The way from an engine to its room in the fabric, which may be away at any time.

An engine never waits for a fabric that is slow or gone: after a failure the link stays
down for a while, and every call in that time answers at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from kvfabric.clock import Clock, SystemClock
from kvfabric.errors import FabricError
from kvfabric.types import Namespace
from kvfabric_client import Client, Room, connect

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 30.0

T = TypeVar("T")
log = logging.getLogger("vllm.kvfabric")  # below vLLM's own logger, so that it is shown


@dataclass(frozen=True, slots=True)
class Door:
    """What it takes to open a room: `home` None finds the node on this host."""

    home: str | None
    namespace: Namespace


class Link:
    """One room, opened on demand and again after each outage. For one thread at a time."""

    def __init__(self, door: Door, who: str, timeout_s: float, clock: Clock | None = None) -> None:
        self._door = door
        self._who = who
        self._timeout_s = timeout_s
        self._clock = clock or SystemClock()
        self._client: Client | None = None
        self._room: Room | None = None
        self._retry_s = FIRST_RETRY_S
        self._down_until_s: float | None = None
        self._silent = False

    @property
    def is_down(self) -> bool:
        """Whether a call made now would not even try."""
        return self._down_until_s is not None and self._clock.now() < self._down_until_s

    def call(self, action: Callable[[Room], T], open_s: float | None = None) -> T | None:
        """What `action` returns of the room, or None: the link is down, or it failed.

        `open_s`: how long opening the room may take, if not as long as any call. Nothing is
        raised, and each outage is one line in the log.
        """
        if self.is_down:
            return None
        try:
            answer = action(self._opened(self._timeout_s if open_s is None else open_s))
        except FabricError as error:
            self._fail(error)
            return None
        except Exception as error:  # an engine never dies of the fabric
            log.debug("unexpected", exc_info=True)
            self._fail(error)
            return None
        self._mend()
        return answer

    def close(self) -> None:
        """Leave the fabric; the next call would open it again."""
        client, self._client, self._room = self._client, None, None
        if client is not None:
            try:
                client.close()
            except Exception:
                log.debug("closing", exc_info=True)

    def _opened(self, timeout_s: float) -> Room:
        if self._room is None:
            self._client = connect(
                self._door.home, tenant=self._door.namespace.tenant, timeout_s=timeout_s
            )
            self._room = self._client.open(self._door.namespace)
        return self._room

    def _fail(self, error: Exception) -> None:
        self.close()
        self._down_until_s = self._clock.now() + self._retry_s
        self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)
        if not self._silent:
            self._silent = True
            log.warning(
                "kvfabric: %s goes on without the fabric and tries again later: %s: %s",
                self._who,
                type(error).__name__,
                error,
            )

    def _mend(self) -> None:
        if self._silent:
            log.warning("kvfabric: %s has the fabric again", self._who)
        self._retry_s = FIRST_RETRY_S
        self._down_until_s = None
        self._silent = False
