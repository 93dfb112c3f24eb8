"""Many requests that share a prefix: in one message, against one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kvfabric_client.bench.attention.field import Field
from kvfabric_client.bench.attention.plan import (
    STACKED,
    STACKED_REQUESTS,
    STACKED_TOKENS,
    target_of,
)
from kvfabric_client.bench.attention.shapes import MAIN, MAIN_FP32, Shape
from kvfabric_client.bench.rounds import Case

SHAPES: Final = dict(zip(STACKED, (MAIN, MAIN_FP32), strict=True))
EVERYBODY: Final = range(STACKED_REQUESTS)
REPEATS: Final = 4
WARM_ROUNDS: Final = 6


class Stacking:
    """Each request has a span of its own over the same blocks."""

    def __init__(self, field: Field) -> None:
        self._field = field
        self._asker = field.asker(field.tcp)

    def cases(self, names: Sequence[str]) -> list[Case]:
        return [self._case(name, SHAPES[name]) for name in names]

    def _case(self, name: str, shape: Shape) -> Case:
        def rate(groups: Sequence[Sequence[int]]) -> float:
            """Requests per second, where each group is one message."""
            taken_s = 0.0
            for _ in range(REPEATS):
                layer, keys = self._field.take(shape, STACKED_TOKENS)
                for requests in groups:
                    taken_s += self._asker.attend(shape, layer, keys, requests).total_s
            return REPEATS * STACKED_REQUESTS / taken_s

        def stacked() -> float:
            return rate([EVERYBODY])

        def one_by_one() -> float:
            return rate([[number] for number in EVERYBODY])

        for _ in range(WARM_ROUNDS):
            stacked()
            one_by_one()
        return Case(name, 0, "1/s", stacked, one_by_one, target_of(name, amx=has_amx()))


def has_amx() -> bool:
    """Whether this processor multiplies matrices of bfloat16 in tiles."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
