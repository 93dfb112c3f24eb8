"""A memory node full of KV, and contexts of any length in it, each in turn."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from kvfabric.attention.floats import narrowed
from kvfabric.errors import DeadlineExceeded
from kvfabric.types import Key
from kvfabric_client.bench.attention.asker import Asker
from kvfabric_client.bench.attention.reading import THREADS
from kvfabric_client.bench.attention.shapes import BLOCK_TOKENS, SHARD_BYTES, Shape
from kvfabric_client.bench.children import Child
from kvfabric_client.bench.lanes import Lane, new_keys

SPARE: Final = 9 / 8  # of the memory, which is cut into segments
BATCH: Final = 64
NUMBERS: Final = 1 << 22  # that KV is made of
READY_TIMEOUT_S: Final = 60.0
READY_POLL_S: Final = 0.05


class Field:
    """`shards` of KV at a node of its own, `within` which its process runs; `host`: its address.

    The same bytes are KV of every shape: numbers in bfloat16, which are numbers in the other
    dtypes as well.
    """

    def __init__(self, shards: int, host: str = "127.0.0.1", within: Sequence[str] = ()) -> None:
        self._owned = contextlib.ExitStack()
        try:
            folder = self._owned.enter_context(
                tempfile.TemporaryDirectory(prefix="kvfabric-bench-")
            )
            node = self._owned.enter_context(_node(shards, host, folder, within))
            self.unix = f"unix:{node.ready['unix_path']}"
            self.tcp = f"tcp:{node.ready['tcp_address']}"
            self._lane = self._open_lane(self.unix)
            _await_memory(self._lane)
            self._keys = self._fill(shards)
        except BaseException:
            self.close()
            raise
        self._next: dict[tuple[Shape, int], int] = {}

    def close(self) -> None:
        self._owned.close()

    def asker(self, address: str) -> Asker:
        asker = Asker(address, self._lane.stored)
        return self._owned.enter_context(contextlib.closing(asker))

    def fetcher(self) -> Lane:
        """Reads shards by TCP, without checksums."""
        return self._open_lane(self.tcp)

    def take(self, shape: Shape, tokens: int) -> tuple[int, list[Key]]:
        """A layer, and the blocks of a context: not those of the last calls, as long as there
        are others."""
        turn = self._next.get((shape, tokens), 0)
        self._next[shape, tokens] = turn + 1
        return turn // self._turns(tokens) % shape.layers, self.context(turn, tokens)

    def context(self, turn: int, tokens: int) -> list[Key]:
        """The blocks of one context, wherever they lie."""
        blocks = tokens // BLOCK_TOKENS
        start = turn % self._turns(tokens) * blocks
        return (self._keys + self._keys)[start : start + blocks]

    def _turns(self, tokens: int) -> int:
        """So many contexts until all shards had their turn."""
        return -(-len(self._keys) * BLOCK_TOKENS // tokens)

    def _open_lane(self, address: str) -> Lane:
        lane = Lane(address, checksums=False, room_bytes=SHARD_BYTES)
        return self._owned.enter_context(contextlib.closing(lane))

    def _fill(self, shards: int) -> list[Key]:
        """Their keys, in no order: neighbours in a context are none in memory."""
        chance = np.random.default_rng(0)
        bits = narrowed(chance.standard_normal(NUMBERS, np.float32), "bfloat16")
        pool = memoryview(bits.data).cast("B")
        keys = new_keys(shards)
        for at in range(0, shards, BATCH):
            some = keys[at : at + BATCH]
            starts = 2 * chance.integers(0, NUMBERS - SHARD_BYTES // 2, len(some))
            self._lane.store(some, [pool[start : start + SHARD_BYTES] for start in starts.tolist()])
        random.Random(0).shuffle(keys)
        return keys


def _node(shards: int, host: str, folder: str, within: Sequence[str]) -> Child:
    return Child(
        "kvfabric_nodes",
        *("--node", "bench", "--memory", str(int(SPARE * shards * SHARD_BYTES))),
        *("--segment", str(16 * SHARD_BYTES), "--attention-threads", str(THREADS)),
        *("--runtime-dir", folder, "--tcp", f"{host}:0", "--keeper", "false"),
        within=within,
    )


def _await_memory(lane: Lane) -> None:
    """Until the node has faulted all its memory in."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not lane.ready():
        if time.monotonic() > deadline_s:
            raise DeadlineExceeded(
                f"the node's memory is not there after {READY_TIMEOUT_S:g} s; give it less"
            )
        time.sleep(READY_POLL_S)
