"""Room for open blocks, and blocks that come home: what the calls on sequences wait for.

Here bytes are copied and zeroed, and lending is asked, where it is on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.sequences.core import Sequences
from kvfabric_nodes.sequences.sequence import Block, OpenSequence, Shape
from kvfabric_nodes.serving.handler import Handler, MakeRoom
from kvfabric_nodes.store.extents import Extent

ZEROED_BYTES = 64 << 20  # by one call: some hundredths of a second of the loop

FetchHome = Callable[[NamespaceId, Sequence[Key]], Awaitable[Any]]
"""Brings shards from other nodes here, as far as it can; answers when it is done."""

Whereabouts = Callable[[NamespaceId, Key], str | None]
"""The node that a key was lent to; None: it is not on loan."""

Discard = Callable[[NamespaceId, Sequence[Key]], None]
"""Once nobody needs these any more, their lent copies are dropped."""

Claim = Callable[[NamespaceId, str, int, int, Sequence[Key]], None]
"""Like shards of a tenant, with their layers and size, are to be kept where they are."""


class SequenceRoom:
    """See the module. The functions that it is given are lending's."""

    def __init__(self, handler: Handler, sequences: Sequences) -> None:
        self.sequences = sequences
        self.make_room: MakeRoom | None = None
        self.fetch_home: FetchHome | None = None
        self.whereabouts: Whereabouts = lambda namespace, key: None
        self.claim: Claim = lambda namespace, tenant, layers, size_bytes, keys: None
        self.discard: Discard = lambda namespace, keys: None
        self._handler = handler

    def open_blocks(self, sequence: OpenSequence, blocks: int) -> tuple[int, str]:
        """Opens blocks as `Sequences.extend`; whoever cannot see them must know what is in them."""
        before, size_bytes = len(sequence.tails), sequence.shape.size_bytes
        unseen = sequence.session is not None and not sequence.session.shares_memory
        most = before + max(1, ZEROED_BYTES // size_bytes) if unseen else blocks
        lacking, reason = self.sequences.extend(
            sequence, min(blocks, most), self._handler.clock.now()
        )
        self._handler.renew_memory()
        if unseen:
            for tail in sequence.tails[before:]:
                self.view(tail.extent, sequence.shape)[:] = bytes(size_bytes)
        if most < blocks and not reason:
            reason = f"{most - before} blocks at a time; extend again for more"
        return lacking, reason

    async def seek(self, sequence: OpenSequence, tenant: str, blocks: int, within_s: float) -> bool:
        """Whether room came free; the sequence does not end for idleness meanwhile."""
        if self.make_room is None:
            return False
        sequence.calls += 1
        try:
            return await self.make_room(tenant, sequence.shape.size_bytes, blocks, within_s)
        finally:
            sequence.calls -= 1

    async def bring_home(self, sequence: OpenSequence, key: Key, within_s: float) -> bool:
        """Whether the block is here then."""
        if self.fetch_home is None:
            return False
        sequence.calls += 1
        try:
            await asyncio.wait_for(self.fetch_home(sequence.namespace, [key]), within_s)
        except TimeoutError:
            return False
        finally:
            sequence.calls -= 1
        return self._handler.core.shards.get(sequence.namespace, key) is not None

    def keep(self, sequence: OpenSequence) -> None:
        """What it has at other nodes is to stay there, as far as they agree; nobody waits."""
        if sequence.session is None or not sequence.away:
            return
        room, shape = self._handler.core.shards.room(sequence.namespace), sequence.shape
        away = [block.key for block in sequence.blocks if block.key not in room]
        tenant = sequence.session.tenant
        self.claim(sequence.namespace, tenant, shape.layers, shape.size_bytes, away)

    def place(self, namespace: NamespaceId, block: Block) -> str:
        """The node that has this block, as far as this one knows; empty: none."""
        if self._handler.core.shards.get(namespace, block.key) is not None:
            return self._handler.identity.node
        return self.whereabouts(namespace, block.key) or block.seen_at

    def view(self, extent: Extent, shape: Shape) -> memoryview:
        return self._handler.arena.view(extent.segment, extent.offset, shape.size_bytes)

    def copy(self, source: Extent, target: Extent, shape: Shape) -> None:
        """A whole block: where in it a token's bytes are, its packing knows."""
        self.view(target, shape)[:] = self.view(source, shape)


def put_tails(tails: node_pb2.Tails, sequence: OpenSequence) -> None:
    """The open blocks, in order."""
    extents = [tail.extent for tail in sequence.tails]
    tails.segments.extend([extent.segment for extent in extents])
    tails.offsets.extend([extent.offset for extent in extents])
    tails.generations.extend([extent.generation for extent in extents])
    tails.first_token = sequence.sealed
