"""The SDK for asyncio: the same methods as coroutines.

Copies, hashes and sockets must leave the event loop in any case, so the synchronous client
is the implementation and this one runs its calls in a few threads. A cancelled await
leaves its call to end by its deadline; only then are its buffers the caller's again.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import Format, Key, Namespace, Status
from kvfabric_client.aio_sequence import AsyncBank, AsyncGroup, AsyncSequence, AsyncState
from kvfabric_client.answers import Match, View
from kvfabric_client.buffers import Bytes
from kvfabric_client.client import Client
from kvfabric_client.client import connect as connect_sync
from kvfabric_client.closing import AsyncClosing
from kvfabric_client.room import Room

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 4  # calls under way at once, per client


async def connect(home: str | None = None, **options: Any) -> AsyncClient:
    """As `kvfabric_client.connect`."""
    return AsyncClient(await asyncio.to_thread(connect_sync, home, **options))


class AsyncClient(AsyncClosing):
    """See `Client`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._threads = ThreadPoolExecutor(THREADS, "kvfabric-call")

    def open(self, namespace: Namespace) -> AsyncRoom:
        return AsyncRoom(self._client.open(namespace), self.run)

    async def stats(self, timeout_s: float | None = None) -> types_pb2.NodeStats:
        return await self.run(self._client.stats, timeout_s)

    async def nodes(self, timeout_s: float | None = None) -> list[control_pb2.NodeInfo]:
        return await self.run(self._client.nodes, timeout_s)

    async def report_steps(
        self,
        batch: Sequence[int],
        tokens: Sequence[int],
        seconds: Sequence[float],
        *,
        waiting: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        await self.run(
            self._client.report_steps, batch, tokens, seconds, waiting=waiting, timeout_s=timeout_s
        )

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs one synchronous call in a thread of this client."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, functools.partial(call, *args, **kwargs))

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self._client.close)


class AsyncRoom:
    """See `Room`."""

    def __init__(self, room: Room, run: Callable[..., Any]) -> None:
        self._room = room
        self._run = run
        self.id = room.id

    async def match(
        self, keys: Sequence[Key], *, local_only: bool = False, timeout_s: float | None = None
    ) -> Match:
        found: Match = await self._run(
            self._room.match, keys, local_only=local_only, timeout_s=timeout_s
        )
        return found

    async def put(
        self,
        keys: Sequence[Key],
        buffers: Sequence[Any],
        *,
        parents: Sequence[Key | None] | None = None,
        layers: int = 1,
        ttl_s: float = 0.0,
        at: str = "",
        timeout_s: float | None = None,
    ) -> list[Status]:
        statuses: list[Status] = await self._run(
            self._room.put,
            keys,
            buffers,
            parents=parents,
            layers=layers,
            ttl_s=ttl_s,
            at=at,
            timeout_s=timeout_s,
        )
        return statuses

    async def get(
        self,
        keys: Sequence[Key],
        *,
        verify: bool = True,
        at: str = "",
        timeout_s: float | None = None,
    ) -> list[Bytes | None]:
        copies: list[Bytes | None] = await self._run(
            self._room.get, keys, verify=verify, at=at, timeout_s=timeout_s
        )
        return copies

    async def get_into(
        self,
        keys: Sequence[Key],
        buffers: Sequence[Any],
        *,
        verify: bool = True,
        at: str = "",
        timeout_s: float | None = None,
    ) -> list[Status]:
        statuses: list[Status] = await self._run(
            self._room.get_into, keys, buffers, verify=verify, at=at, timeout_s=timeout_s
        )
        return statuses

    async def view(
        self, keys: Sequence[Key], *, lease_s: float = 30.0, timeout_s: float | None = None
    ) -> View:
        """The view's own methods are quick and synchronous; use it in a `with` statement."""
        view: View = await self._run(self._room.view, keys, lease_s=lease_s, timeout_s=timeout_s)
        return view

    async def pin(self, keys: Sequence[Key], *, timeout_s: float | None = None) -> list[Status]:
        statuses: list[Status] = await self._run(self._room.pin, keys, timeout_s=timeout_s)
        return statuses

    async def unpin(self, keys: Sequence[Key], *, timeout_s: float | None = None) -> list[Status]:
        statuses: list[Status] = await self._run(self._room.unpin, keys, timeout_s=timeout_s)
        return statuses

    async def purge(
        self, keys: Sequence[Key] = (), *, owner: str = "", timeout_s: float | None = None
    ) -> tuple[int, int]:
        erased: tuple[int, int] = await self._run(
            self._room.purge, keys, owner=owner, timeout_s=timeout_s
        )
        return erased

    async def explain(self, key: Key, *, timeout_s: float | None = None) -> list[types_pb2.Event]:
        events: list[types_pb2.Event] = await self._run(
            self._room.explain, key, timeout_s=timeout_s
        )
        return events

    async def sequence(self, form: Format | None = None, **options: Any) -> AsyncSequence:
        """As `Room.sequence`, for an `async with` statement once it is awaited."""
        return AsyncSequence(await self._run(self._room.sequence, form, **options), self._run)

    def bank(self, form: Format, keys: Sequence[Key], **options: Any) -> AsyncBank:
        return AsyncBank(self._room.bank(form, keys, **options), self._run)

    async def group(self, chains: Sequence[Sequence[Key]], **options: Any) -> AsyncGroup:
        return AsyncGroup(await self._run(self._room.group, chains, **options), self._run)

    def state(self, name: str | bytes, *, at: str = "") -> AsyncState:
        return AsyncState(self._room.state(name, at=at), self._run)

    async def hand_off(self, keys: Sequence[Key], **options: Any) -> dict[str, Any]:
        given: dict[str, Any] = await self._run(self._room.hand_off, keys, **options)
        return given

    async def address_of(self, node: str, *, timeout_s: float | None = None) -> str:
        address: str = await self._run(self._room.address_of, node, timeout_s=timeout_s)
        return address

    async def take(
        self, given: Mapping[str, Any], buffers: Sequence[Any], **options: Any
    ) -> list[Status]:
        statuses: list[Status] = await self._run(self._room.take, given, buffers, **options)
        return statuses
