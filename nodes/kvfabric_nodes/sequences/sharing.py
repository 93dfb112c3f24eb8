"""Which open sequences have which sealed blocks, and how many of these are on this node.

Each sequence claims each of its blocks once, so that a block stays, here or on loan, as
long as any sequence has it. Tentative forks come and go with every step of an engine, so
they have their root's blocks through it, and claim what it lets go only when it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.sequences.sequence import Block, OpenSequence
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.shards import Shard

Name = tuple[NamespaceId, Key]


class Sharing:
    """See the module."""

    def __init__(self, core: NodeCore) -> None:
        self.core = core
        self.sharers: dict[Name, dict[OpenSequence, None]] = {}
        core.on_sealed.append(self._came)
        core.on_dropped.append(self._went)

    def has(self, sequence: OpenSequence, key: Key) -> bool:
        return sequence in self.sharers.get((sequence.namespace, key), ())

    def take(self, sequence: OpenSequence, block: Block) -> None:
        """Another sealed block at the sequence's end."""
        name = (sequence.namespace, block.key)
        sharers = self.sharers.setdefault(name, {})
        assert sequence not in sharers
        sharers[sequence] = None
        self.core.shards.claim(*name)
        sequence.away += self.core.shards.get(*name) is None
        sequence.ends.append(sequence.sealed + block.tokens)
        sequence.blocks.append(block)

    def share(self, fork: OpenSequence, parent: OpenSequence, blocks: int) -> None:
        """A new sequence has the first blocks of another."""
        if (fork.root is not None and parent.through_root >= blocks) or parent is fork.root:
            fork.blocks, fork.ends = parent.blocks[:blocks], parent.ends[:blocks]
            fork.through_root = blocks
            return
        for block in parent.blocks[:blocks]:
            self.take(fork, block)

    def _claim_all(self, fork: OpenSequence) -> None:
        """Its root is about to change."""
        blocks, fork.blocks, fork.ends = fork.blocks, [], []
        fork.through_root = 0
        for block in blocks:
            self.take(fork, block)

    def leave(self, sequence: OpenSequence, kept: int, now_s: float) -> None:
        """Only the first sealed blocks stay the sequence's."""
        for fork in sequence.forks.values():
            if fork.through_root > kept:
                self._claim_all(fork)
        gone = sequence.blocks[max(kept, sequence.through_root) :]
        sequence.through_root = min(kept, sequence.through_root)
        del sequence.blocks[kept:], sequence.ends[kept:]
        sequence.lent_first = min(kept, sequence.lent_first)
        for block in reversed(gone):
            name = (sequence.namespace, block.key)
            sharers = self.sharers[name]
            del sharers[sequence]
            if not sharers:
                del self.sharers[name]
            sequence.away -= self.core.shards.get(*name) is None
            self.core.end_of_claim(*name, now_s)

    def _came(self, shard: Shard, now_s: float) -> None:
        for sequence in self.sharers.get((shard.namespace, shard.key), ()):
            sequence.away -= 1
            sequence.lent_first = 0

    def _went(self, shard: Shard, why: str, now_s: float) -> None:
        for sequence in self.sharers.get((shard.namespace, shard.key), ()):
            sequence.away += 1

    def claims(self) -> Counter[Name]:
        """How many sequences claim each key."""
        return Counter({name: len(sharers) for name, sharers in self.sharers.items()})

    def check(self, sequences: Iterable[OpenSequence]) -> None:
        """Asserts that exactly these sequences' blocks are claimed, and counted right."""
        sharers: dict[Name, set[OpenSequence]] = {}
        for sequence in sequences:
            away = 0
            for block in sequence.blocks[sequence.through_root :]:
                name = (sequence.namespace, block.key)
                assert sequence not in sharers.setdefault(name, set())
                sharers[name].add(sequence)
                away += self.core.shards.get(*name) is None
            assert sequence.away == away
            room = self.core.shards.room(sequence.namespace)
            assert all(block.key not in room for block in sequence.blocks[: sequence.lent_first])
        assert {name: set(s) for name, s in self.sharers.items()} == sharers
        assert all(self.core.shards.claims(*name) >= len(s) for name, s in sharers.items())
