"""A sequence: one request's context, written by one writer, read from wherever its blocks lie.

Made by `Room.sequence`. Appended tokens go into open blocks of the home node; full blocks become
shards by themselves. When the home node goes away, the next write opens the sequence at another
one with the same blocks; what was not sealed is lost then, and `length` says so.
"""

from __future__ import annotations

import contextlib
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from kvfabric.attention.merge import Partial
from kvfabric.errors import Conflict, FabricError, Refused
from kvfabric_client.attention.answers import Attended, Best, Pages
from kvfabric_client.attention.calls import attend_batch
from kvfabric_client.attention.context import Context
from kvfabric_client.attention.queries import New, Query, shape_for
from kvfabric_client.attention.recall import best_of
from kvfabric_client.attention.source import SequenceSource
from kvfabric_client.blocks import RawSource, Source, raw_source, source_of
from kvfabric_client.closing import Closing
from kvfabric_client.deadline import Deadline
from kvfabric_client.outline import checked_ids
from kvfabric_client.sequence_reads import Missing, SequenceReads
from kvfabric_client.sequence_writer import Writer

RENEW_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 2.0


class Sequence(SequenceReads, Closing):
    """See the module. Thread-safe: writes one after the other, reads beside them. A context
    manager that closes."""

    def __init__(self, writer: Writer) -> None:
        super().__init__(writer)
        self.context = Context(SequenceSource(writer))
        self._tentative: weakref.WeakSet[Sequence] = weakref.WeakSet()
        writer.room.client.renewals.add(self, writer.home.idle_s / 3)

    # What there is ------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Tokens that can be read in every layer. The next append begins here."""
        return self.writer.outline.length

    @property
    def sealed(self) -> int:
        """Tokens in blocks that are shards: these outlive the writer, and the home node as far
        as they have replicas."""
        return self.writer.outline.sealed

    @property
    def token_ids(self) -> array[int]:
        """A copy of the ids of all tokens."""
        return self.writer.outline.tokens[:]

    @property
    def node(self) -> str:
        """The home node's name."""
        return self.writer.home.node

    @property
    def id(self) -> int:
        """Its number at its home node."""
        return self.writer.home.sequence

    # Attending ----------------------------------------------------------------------

    def attend(
        self,
        queries: Any,
        *,
        layer: int,
        positions: Any = None,
        visible: int | None = None,
        tokens: Iterable[range] | None = None,
        new: New | None = None,
        local: Partial | Callable[[], Partial] | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        window: int = 0,
        sinks: int = 0,
        value_dim: int = 0,
        pages: Pages | None = None,
        timeout_s: float | None = None,
    ) -> Attended:
        """Attention of these rows over this sequence, computed by the nodes that have its KV.
        What lies at a node that computes none comes here, a few blocks at a time.

        `queries`: [rows, query heads, head dim], an array or CPU tensor in the KV's dtype
        (bfloat16 also as its bits) or float32. `layer` counts from 0 in this part.

        `positions`: one per row, which then sees tokens up to its own; none: every row sees all
        before `visible`, by default all that this layer has. With a `window` a row sees so many
        tokens back, its own counted, and the first `sinks`. `tokens`: of the stored ones only
        these ranges. `scale`: 1 / sqrt(head dim) by default. `softcap` as in Gemma. `value_dim`:
        of MLA latents, whose queries are in the absorbed form.

        `new`: (token ids, K, V), each [heads, tokens, head dim], of tokens that come now (of MLA
        (token ids, latents, None)): they are appended in this layer after the queries went out,
        and attended here, causally. They begin at the first position, else where the layer ends;
        there are as many rows, or `visible` says where they begin. `local`: attention over
        tokens that the engine keeps itself, or a function that computes it meanwhile.

        `pages` makes it sparse. Each token counts once, wherever its block has moved meanwhile.
        Raises Missing, with the ranges, where tokens are nowhere, or on a node that does not
        answer: compute their KV, `restore` what is sealed, append the rest, and ask again, with
        the positions: new tokens were appended, which is then not repeated.
        """
        query = Query(self, queries, positions, visible, tokens, new, local)
        (answer,) = attend_batch(
            [query],
            layer=layer,
            scale=scale,
            softcap=softcap,
            window=window,
            sinks=sinks,
            value_dim=value_dim,
            pages=pages,
            timeout_s=timeout_s,
        )
        if isinstance(answer, Missing):
            raise answer
        return answer

    def top_k(
        self,
        queries: Any,
        k: int,
        *,
        layer: int,
        page_tokens: int = 0,
        values: bool = False,
        value_dim: int = 0,
        timeout_s: float | None = None,
    ) -> list[Best]:
        """Per row the `k` tokens of the context whose keys have the greatest inner products with
        it, as `Bank.top_k`. Pages are those of sealed blocks."""
        shape = shape_for(self.shape, value_dim)
        with self.using(timeout_s) as deadline:
            self.writer.ready(deadline)
            self.context.begin(deadline)
            end = self.length
            return best_of(
                self.context,
                shape,
                queries,
                k,
                layer=layer,
                page_tokens=page_tokens,
                values=values,
                tokens=[(0, end)] if end else [],
                deadline=deadline,
            )

    # Writing ------------------------------------------------------------------------

    def append(
        self,
        token_ids: Any,
        kv: Any,
        *,
        layer: int | None = None,
        start: int | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Appends the KV of these tokens, of all layers or of one; answers the length.

        `kv`: `[layers, 2, heads, tokens, head dim]` (2: K, V), or a list with an entry per
        layer, each `[2, heads, tokens, head dim]` or a pair (K, V); with `layer` one such entry.
        numpy arrays or CPU tensors, any strides. For a packing of one's own: a list of whole
        blocks' bytes. `start`: the position of the first token, by default where the layer ends.
        With it an append may be repeated after a failure: what is there already is skipped.

        Conflict where tokens before `start` are missing, because they were lost with the home
        node, say: append those from `length` on again. Retry where there is no room.
        """
        ids = checked_ids(token_ids)
        source: Source | RawSource
        if self.shape.plain:
            source = source_of(self.shape, kv, len(ids), layer)
        else:
            source = raw_source(self.shape, kv, len(ids), layer)
        with self._writing(timeout_s) as (writer, deadline):
            first = writer.outline.start_of(layer) if start is None else start
            writer.ready(deadline)
            writer.append(first, ids, source, layer, deadline)
            return self.length

    def seal(self, *, timeout_s: float | None = None) -> int:
        """Seals the last block although it is short; answers the sealed tokens. What follows
        begins a new block. Refused while layers differ, and for a packing of one's own."""
        with self._writing(timeout_s) as (writer, deadline):
            writer.ready(deadline)
            writer.seal(deadline, short=True)
            return self.sealed

    def truncate(self, tokens: int, *, timeout_s: float | None = None) -> int:
        """Forgets what comes behind the first `tokens`; answers the length."""
        with self._writing(timeout_s) as (writer, deadline):
            writer.ready(deadline)
            self._check_length(tokens)
            writer.truncate(tokens, deadline)
            return self.length

    def fork(
        self,
        tokens: int | None = None,
        *,
        tentative: bool = False,
        idle_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Sequence:
        """A second sequence that shares the first `tokens` (None: all), stored once.

        `tentative`: an attempt, of which the node allows a bounded number per sequence; it seals
        nothing. One of them may become its parent's content by `accept`; that ends all others.
        """
        with self._writing(timeout_s) as (writer, deadline):
            writer.ready(deadline)
            length = self.length if tokens is None else tokens
            self._check_length(length)
            idle = idle_s or writer.home.idle_s
            fork = Sequence(writer.fork(length, idle, deadline, tentative=tentative))
            if tentative:
                self._tentative.add(fork)
            return fork

    def accept(
        self,
        fork: Sequence | None,
        tokens: int | None = None,
        *,
        timeout_s: float | None = None,
    ) -> int:
        """Takes over what a tentative fork has up to `tokens` (None: all), and ends every
        tentative fork. None: takes nothing over. Answers the length."""
        if fork is not None and fork not in self._tentative:
            raise Refused("only a tentative fork of this sequence can be accepted, and only once")
        with self._writing(timeout_s) as (writer, deadline):
            writer.ready(deadline)
            taken = fork or self
            length = taken.length if tokens is None else tokens
            if length > taken.length:
                raise Refused(f"{length} tokens of an attempt that has {taken.length}")
            writer.accept(fork.writer if fork else None, length, deadline)
            self._end_tentative()
            return self.length

    def move(self, *, timeout_s: float | None = None) -> str:
        """Seals what is open and goes on at another node; answers its name. The blocks stay
        where they are. Done by itself where the home node is being drained."""
        with self._writing(timeout_s) as (writer, deadline):
            writer.ready(deadline)
            writer.move(deadline)
            return self.node

    def close(self, *, drop: bool = False, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Ends it. Its sealed blocks stay as cache; with `drop` those that nobody else keeps go
        at once. Safe to repeat; a node that does not answer ends it by its idle deadline."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._end_tentative()
            self.context.close()
            with contextlib.suppress(FabricError):
                self.writer.home.close(Deadline.after(timeout_s), drop=drop)

    # Inside -------------------------------------------------------------------------

    def renew(self) -> bool:
        """Puts off the idle deadline. Called in the background while this object lives."""
        if not self._lock.acquire(blocking=False):
            return not self.closed  # a call is under way, which does the same
        try:
            if self.closed:
                return False
            deadline = Deadline.after(RENEW_TIMEOUT_S)
            if not self.writer.unsure:
                self.writer.home.renew(self.length, deadline)
                self._note_attempts()
                # Also where nobody writes; but others must be renewed too, so nobody waits here.
                self.writer.leaves(deadline, wait_s=0.0)
            return True
        except (Refused, Conflict):
            return True  # the next write finds out and says so
        finally:
            self._lock.release()

    def _end_tentative(self) -> None:
        for fork in list(self._tentative):
            fork.closed = True
            fork.context.close()
        self._tentative.clear()

    def _note_attempts(self) -> None:
        self.writer.has_attempts = any(not fork.closed for fork in self._tentative)

    def _check_length(self, tokens: int) -> None:
        if not 0 <= tokens <= self.length:
            raise Refused(f"{tokens} tokens of a sequence that has {self.length}")

    @contextlib.contextmanager
    def _writing(self, timeout_s: float | None) -> Iterator[tuple[Writer, Deadline]]:
        with self.using(timeout_s) as deadline:
            self._note_attempts()
            yield self.writer, deadline
