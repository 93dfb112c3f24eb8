"""Sequences, groups and states for asyncio: the same methods as coroutines. See `aio`."""

from __future__ import annotations

import functools
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from kvfabric_client.attention.bank import Bank
from kvfabric_client.blocks import Array
from kvfabric_client.closing import AsyncClosing
from kvfabric_client.group import Group, Shared
from kvfabric_client.sequence import Sequence
from kvfabric_client.sequence_reads import SequenceReads
from kvfabric_client.state import State

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)

Run = Callable[..., Coroutine[Any, Any, Any]]
"""Runs one synchronous call in a thread of the client."""


class _Wraps(Generic[S_co]):
    def __init__(self, sync: S_co, run: Run) -> None:
        self.sync = sync
        self.run = run


def _as_coroutine(
    method: Callable[Concatenate[S, P], T],
) -> Callable[Concatenate[_Wraps[S], P], Coroutine[Any, Any, T]]:
    @functools.wraps(method)
    async def call(self: _Wraps[S], /, *args: P.args, **kwargs: P.kwargs) -> T:
        answer: T = await self.run(functools.partial(method, self.sync), *args, **kwargs)
        return answer

    return call


class AsyncSequence(_Wraps[Sequence], AsyncClosing):
    """See `Sequence`. Its views are quick and synchronous; use them in a `with` statement."""

    append = _as_coroutine(Sequence.append)
    seal = _as_coroutine(Sequence.seal)
    truncate = _as_coroutine(Sequence.truncate)
    move = _as_coroutine(Sequence.move)
    close = _as_coroutine(Sequence.close)
    attend = _as_coroutine(Sequence.attend)
    top_k = _as_coroutine(Sequence.top_k)
    read = _as_coroutine(SequenceReads.read)
    read_into = _as_coroutine(SequenceReads.read_into)
    read_blocks = _as_coroutine(SequenceReads.read_blocks)
    view = _as_coroutine(SequenceReads.view)
    restore = _as_coroutine(SequenceReads.restore)
    blocks = _as_coroutine(SequenceReads.blocks)

    @property
    def length(self) -> int:
        return self.sync.length

    @property
    def sealed(self) -> int:
        return self.sync.sealed

    @property
    def token_ids(self) -> array[int]:
        return self.sync.token_ids

    @property
    def node(self) -> str:
        return self.sync.node

    async def fork(self, tokens: int | None = None, **options: Any) -> AsyncSequence:
        return AsyncSequence(await self.run(self.sync.fork, tokens, **options), self.run)

    async def accept(
        self,
        fork: AsyncSequence | None,
        tokens: int | None = None,
        *,
        timeout_s: float | None = None,
    ) -> int:
        taken = None if fork is None else fork.sync
        length: int = await self.run(self.sync.accept, taken, tokens, timeout_s=timeout_s)
        return length

    async def chunks(
        self, start: int = 0, end: int | None = None, **options: Any
    ) -> AsyncIterator[tuple[range, Array]]:
        pieces = self.sync.chunks(start, end, **options)
        while (piece := await self.run(next, pieces, None)) is not None:
            yield piece


class AsyncGroup(_Wraps[Group], AsyncClosing):
    """See `Group`."""

    close = _as_coroutine(Group.close)

    @property
    def shared(self) -> list[Shared]:
        return self.sync.shared


class AsyncState(_Wraps[State]):
    """See `State`."""

    version = _as_coroutine(State.version)
    get = _as_coroutine(State.get)
    swap = _as_coroutine(State.swap)
    put = _as_coroutine(State.put)
    update = _as_coroutine(State.update)


class AsyncBank(_Wraps[Bank]):
    """See `Bank`."""

    top_k = _as_coroutine(Bank.top_k)
    reduce = _as_coroutine(Bank.reduce)
    attend = _as_coroutine(Bank.attend)
    close = _as_coroutine(Bank.close)
