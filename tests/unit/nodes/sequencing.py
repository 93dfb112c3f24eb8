"""A sequence as a test writes it: without bytes, by the calls of the core."""

from __future__ import annotations

from collections.abc import Sequence

from kvfabric.types import Key, Status
from kvfabric_nodes.sequences.core import Sequences
from kvfabric_nodes.sequences.sequence import Block, OpenSequence, Shape

from .conftest import SHARD_BYTES, Desk

TOKENS = 4  # of a full block
LAYERS = 2
SHAPE = Shape(SHARD_BYTES, LAYERS, TOKENS)
IDLE_S = 10.0


def begin(sequences: Sequences, desk: Desk, keys: Sequence[Key] = ()) -> OpenSequence:
    """A sequence that begins with these full blocks."""
    blocks = [Block(key, TOKENS) for key in keys]
    return sequences.open(desk.session, desk.namespace, SHAPE, blocks, IDLE_S, desk.now_s)


def write(sequences: Sequences, sequence: OpenSequence, tokens: int, now_s: float = 0.0) -> None:
    """Appends so many tokens at the end, with as many open blocks as they need."""
    end = sequence.length + tokens
    blocks = -(-(end - sequence.sealed) // TOKENS)
    lacking, reason = sequences.extend(sequence, blocks, now_s)
    assert lacking == 0, reason
    sequence.append(sequence.length, tokens, 0, LAYERS)
    sequence.show(0, LAYERS)
    assert sequence.length == end


def seal(
    sequences: Sequences, sequence: OpenSequence, keys: Sequence[Key], last: int = TOKENS
) -> list[Status]:
    """Seals the first open blocks, the last of them with `last` tokens."""
    tokens = [TOKENS] * (len(keys) - 1) + [last]
    counts = sequences.sealable(sequence, keys, tokens)
    return [
        sequences.seal(sequence, key, count, (1,), 0.0).status
        for key, count in zip(keys, counts, strict=True)
    ]


def put(sequences: Sequences, sequence: OpenSequence, keys: Sequence[Key]) -> None:
    """Writes and seals full blocks, one after the other."""
    for key in keys:
        write(sequences, sequence, TOKENS)
        assert seal(sequences, sequence, [key]) == [Status.OK]
