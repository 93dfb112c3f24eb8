"""Attending KV where it lies, against fetching the same KV and attending it at home."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvfabric.types import Key
from kvfabric_client.bench.attention.asker import Answer, Asker
from kvfabric_client.bench.attention.estimates import crossover, expected_ratio
from kvfabric_client.bench.attention.field import Field
from kvfabric_client.bench.attention.kernels import warm
from kvfabric_client.bench.attention.plan import RACE, REMOTE_TOKENS, target_of
from kvfabric_client.bench.attention.shapes import BLOCK_TOKENS, MAIN, SHARD_BYTES
from kvfabric_client.bench.bare import BareSocket
from kvfabric_client.bench.peer import Ring, faulted_memory
from kvfabric_client.bench.rounds import Case, together

LENGTHS: Final = tuple(BLOCK_TOKENS << power for power in range(8))  # one block to 16k tokens


class Race:
    """Whole shards, so all their layers, both ways. What is fetched would be attended by the
    same kernels: at the node's own socket, where it is already."""

    def __init__(self, field: Field, bare: BareSocket) -> None:
        self._field = field
        self._bare = bare
        self._far = field.asker(field.tcp)
        self._near = field.asker(field.unix)
        self._fetcher = field.fetcher()
        blocks = REMOTE_TOKENS // BLOCK_TOKENS
        self._memory = Ring(memoryview(faulted_memory(blocks * SHARD_BYTES)))
        self._turn = 0

    def cases(self, names: Sequence[str]) -> list[Case]:
        """`names`: RACE or CROSSOVER, and what the row is called."""
        if names:
            for tokens in LENGTHS:
                warm(self._near, self._field, MAIN, tokens)
        return [
            self._race(name) if name.startswith(RACE) else self._crossover(name) for name in names
        ]

    def _race(self, name: str) -> Case:
        return Case(name, 0, "x", *together(self._compared), target_of(name))

    def _crossover(self, name: str) -> Case:
        """Beside one block, the shortest length that is measured."""
        return Case(name, 0, "tokens", self._crossed, lambda: float(BLOCK_TOKENS), None)

    def _compared(self) -> tuple[float, float]:
        keys = self._context(REMOTE_TOKENS)
        answers = _all_layers(self._far, keys)
        bare_s = self._bare.get(self._buffers(keys))
        back = memoryview(bytearray(answers[0].received_bytes))
        trip_s = self._bare.call(bytes(answers[0].sent_bytes), back)
        kernel_s = sum(answer.kernel_s for answer in answers)
        fetch_s = self._fetch_and_attend(self._context(REMOTE_TOKENS))
        ratio = fetch_s / sum(answer.total_s for answer in answers)
        return ratio, expected_ratio(bare_s, kernel_s, trip_s, len(answers))

    def _crossed(self) -> float:
        fetch_s, attend_s = [], []
        for tokens in LENGTHS:
            answers = _all_layers(self._far, self._context(tokens))
            attend_s.append(sum(answer.total_s for answer in answers))
            fetch_s.append(self._fetch_and_attend(self._context(tokens)))
        return crossover(LENGTHS, fetch_s, attend_s)

    def _fetch_and_attend(self, keys: list[Key]) -> float:
        fetch_s = self._fetcher.get(keys, self._buffers(keys))
        return fetch_s + sum(answer.total_s for answer in _all_layers(self._near, keys))

    def _context(self, tokens: int) -> list[Key]:
        self._turn += 1
        return self._field.context(self._turn, tokens)

    def _buffers(self, keys: Sequence[Key]) -> list[memoryview]:
        return [self._memory.take(SHARD_BYTES) for _ in keys]


def _all_layers(asker: Asker, keys: Sequence[Key]) -> list[Answer]:
    return [asker.attend(MAIN, layer, keys) for layer in range(MAIN.layers)]
