"""Bytes that one layer of one step moves, counted at the client's sockets, against the formula."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence as Items
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import kvfabric_client
from kvfabric.attention.floats import narrowed
from kvfabric.errors import Broken, DeadlineExceeded
from kvfabric_client.bench.attention.plan import target_of
from kvfabric_client.bench.attention.shapes import BLOCK_TOKENS, KV_HEADS, MAIN
from kvfabric_client.bench.children import Child
from kvfabric_client.bench.lanes import STORED
from kvfabric_client.bench.rounds import Case, together
from kvfabric_client.room import Room
from kvfabric_client.sequence import Sequence

FAR_TOKENS: Final = 4 * BLOCK_TOKENS  # at the other node
HOME_TOKENS: Final = BLOCK_TOKENS // 2
NODE_BYTES: Final = 64 << 20
FOUND_TIMEOUT_S: Final = 30.0
FOUND_POLL_S: Final = 0.1


class Wire:
    """A sequence with most of its blocks at another node than its home; all calls by TCP."""

    def __init__(self) -> None:
        self._owned = contextlib.ExitStack()
        try:
            home, far = self._rooms()
            with far.sequence(MAIN.format()) as first:
                _append(first, 0, FAR_TOKENS)
            self._sequence = self._owned.enter_context(_found(home))
            _append(self._sequence, FAR_TOKENS, HOME_TOKENS)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._owned.close()

    def cases(self, names: Items[str]) -> list[Case]:
        return [Case(name, 0, "B", *together(self._step), target_of(name)) for name in names]

    def _step(self) -> tuple[float, float]:
        """One new token through all layers; both figures are of one layer."""
        moved = 0
        start = self._sequence.length
        kv = _numbers(2, KV_HEADS, 1, MAIN.head_dim)
        for layer in range(MAIN.layers):
            queries = _numbers(1, MAIN.query_heads, MAIN.head_dim)
            new = ([start], kv[0], kv[1])
            answer = self._sequence.attend(queries, layer=layer, new=new)
            if sum(answer.tokens.values()) != start or len(answer.tokens) != 2:
                raise Broken(f"{start} tokens at two nodes were attended as {answer.tokens}")
            moved += answer.traffic.wire_bytes
        return moved / MAIN.layers, float(MAIN.moved_bytes(parts=2))

    def _rooms(self) -> list[Room]:
        """The same namespace, as clients of one node each."""
        folder = self._owned.enter_context(tempfile.TemporaryDirectory(prefix="kvfabric-bench-"))
        options = ["--runtime-dir", folder]
        manager = self._owned.enter_context(
            Child("kvfabric.manager", "--listen", "127.0.0.1:0", *options)
        )
        options += ["--manager", str(manager.ready["manager"]), "--memory", str(NODE_BYTES)]
        options += ["--tcp", "127.0.0.1:0", "--keeper", "false"]
        rooms = []
        for name in ("home", "far"):
            node = self._owned.enter_context(Child("kvfabric_nodes", "--node", name, *options))
            client = kvfabric_client.connect(f"tcp:{node.ready['tcp_address']}")
            rooms.append(self._owned.enter_context(client).open(STORED))
        return rooms


def _found(home: Room) -> Sequence:
    """The same context at another home, once the manager knows who has its begin."""
    deadline_s = time.monotonic() + FOUND_TIMEOUT_S
    while time.monotonic() < deadline_s:
        sequence = home.sequence(MAIN.format(), tokens=range(FAR_TOKENS))
        if sequence.length == FAR_TOKENS:
            return sequence
        sequence.close()
        time.sleep(FOUND_POLL_S)
    raise DeadlineExceeded(
        f"after {FOUND_TIMEOUT_S:g} s the manager does not know of a shard that was just written"
    )


def _append(sequence: Sequence, start: int, tokens: int) -> None:
    """Token ids are positions."""
    kv = _numbers(MAIN.layers, 2, KV_HEADS, tokens, MAIN.head_dim)
    sequence.append(range(start, start + tokens), kv)


def _numbers(*sizes: int) -> NDArray[Any]:
    return narrowed(np.random.default_rng(0).standard_normal(sizes, np.float32), MAIN.dtype)
