"""What the demo and its engine processes say to each other: one JSON object a line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Spec:
    """An engine. `home`: the address of the node at which its sequence is written; empty: its KV
    stays in its own memory."""

    model: str
    home: str
    chunk_tokens: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Order:
    """Take in a prompt, in chunks; then decode so many tokens, greedily."""

    prompt: list[int] = field(default_factory=list)
    decode: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """After an order; after the start with nothing done. All but `tokens` and `seconds` is since
    the start."""

    tokens: list[int]  # that were chosen
    seconds: list[float]  # that each took; of the first, the whole prompt
    peak_bytes: int  # resident memory beyond what it had before
    held_bytes: int = 0  # KV that its cache has in this process, at most
    totals: dict[str, Any] = field(default_factory=dict)  # of its cache


def dump(message: Spec | Order | Report) -> str:
    return json.dumps(asdict(message))


def load_spec(text: str) -> Spec:
    return Spec(**json.loads(text))


def load_order(line: str) -> Order:
    return Order(**json.loads(line))


def load_report(line: str) -> Report:
    return Report(**json.loads(line))
