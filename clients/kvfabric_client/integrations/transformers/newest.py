"""The newest tokens' KV, kept in the engine's process and handed to the fabric in whole blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvfabric_client.integrations.transformers.local import Tensor
from kvfabric_client.integrations.transformers.rows import Share


@dataclass(frozen=True, slots=True)
class Run:
    """KV of the tokens from position `start` on, in one layer: each `[KV heads, tokens, dim]`."""

    start: int
    key: Tensor
    value: Tensor

    @property
    def end(self) -> int:
        return self.start + self.key.shape[1]

    def cut(self, start: int, end: int) -> Run:
        """A copy of these tokens, so that the memory of the others is free."""
        here = slice(start - self.start, end - self.start)
        return Run(start, self.key[:, here].clone(), self.value[:, here].clone())

    def then(self, new: Run) -> Run:
        return Run(
            self.start, torch.cat([self.key, new.key], 1), torch.cat([self.value, new.value], 1)
        )


class Newest:
    """At least the last `tokens` of each row and layer; nothing where that is 0."""

    def __init__(self, tokens: int, block_tokens: int) -> None:
        self.tokens = tokens
        self._block_tokens = block_tokens
        self._kept: dict[tuple[int, int], Run] = {}

    @property
    def held_bytes(self) -> int:
        return sum(run.key.nbytes + run.value.nbytes for run in self._kept.values())

    def with_new(self, share: Share, layer: int, new: Run) -> Run:
        """What is kept of the tokens before a step, then the step's own."""
        kept = self._kept.get((share.row.index, layer))
        if kept is None or kept.start >= new.start:
            return new
        return kept.cut(kept.start, new.start).then(new)  # a step may be a repetition

    def leaves(self, run: Run) -> int:
        """Up to which position a run goes to the fabric."""
        surplus = max(0, run.end - run.start - self.tokens)
        return run.start + surplus // self._block_tokens * self._block_tokens

    def keep(self, share: Share, layer: int, run: Run) -> None:
        """The end of a run, once its begin is on the fabric."""
        self._kept[share.row.index, layer] = run

    def clear(self) -> None:
        self._kept.clear()
