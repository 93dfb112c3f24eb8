"""Kernels: what the node's own clock says of KV that lies scattered over its memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvfabric_client.bench.attention.asker import Answer, Asker
from kvfabric_client.bench.attention.field import Field
from kvfabric_client.bench.attention.plan import KERNELS, target_of
from kvfabric_client.bench.attention.reading import Reader
from kvfabric_client.bench.attention.shapes import Shape
from kvfabric_client.bench.datapath import GIGA
from kvfabric_client.bench.rounds import Case
from kvfabric_client.bench.targets import MIB

ROUND_BYTES: Final = 256 * MIB
WARM_CALLS: Final = 24  # so that the node has tried its kernels and chosen one


class Kernels:
    """`chosen` has the kernel that the node took, by the row's name."""

    def __init__(self, field: Field, reader: Reader) -> None:
        self.chosen: dict[str, str] = {}
        self._field = field
        self._reader = reader
        self._asker = field.asker(field.unix)

    def cases(self, names: Sequence[str]) -> list[Case]:
        return [self._case(name, *KERNELS[name]) for name in names]

    def _case(self, name: str, shape: Shape, tokens: int) -> Case:
        calls = -(-ROUND_BYTES // (tokens * shape.token_bytes))

        def measure() -> float:
            answers = [attend_next(self._asker, self._field, shape, tokens) for _ in range(calls)]
            self.chosen[name] = answers[-1].kernel
            read_bytes = sum(answer.read_bytes for answer in answers)
            return read_bytes / sum(answer.kernel_s for answer in answers) / GIGA

        def limit() -> float:
            return self._reader.read(calls * tokens * shape.token_bytes) / GIGA

        warm(self._asker, self._field, shape, tokens)
        return Case(name, 0, "GB/s", measure, limit, target_of(name))


def attend_next(asker: Asker, field: Field, shape: Shape, tokens: int) -> Answer:
    """One request's row over the next context."""
    layer, keys = field.take(shape, tokens)
    return asker.attend(shape, layer, keys)


def warm(asker: Asker, field: Field, shape: Shape, tokens: int) -> None:
    """Opens the spans of all contexts, and lets the node choose."""
    for _ in range(WARM_CALLS):
        attend_next(asker, field, shape, tokens)
