"""The rows of a batch: each is a context of its own, whose padding is left out."""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass, field

import torch

from kvfabric.errors import Refused
from kvfabric_client.integrations.transformers.local import Tensor
from kvfabric_client.sequence import Sequence


@dataclass(slots=True, eq=False)
class Row:
    """One context: the ids of its tokens, those of the step under way included, and the sequence
    that has their KV."""

    index: int  # in the batch
    sequence: Sequence
    token_ids: list[int] = field(default_factory=list)

    failed: bool = False  # the last step: some layers may have stored what was taken back

    def settle(self, ids: Listed[int]) -> None:
        """Before these tokens come: where others were taken back, what was stored of them goes."""
        start = len(self.token_ids)
        if self.failed:
            stored = self.sequence.token_ids[start : start + len(ids)].tolist()
            if stored != ids[: len(stored)]:
                self.sequence.truncate(min(self.sequence.length, start))
        self.failed = False

    @property
    def held_bytes(self) -> int:
        """KV of it in this process: open blocks, where the home node's memory is not mapped."""
        tails = self.sequence.writer.home.tails
        return 0 if tails.shared else len(tails) * tails.shape.size_bytes


@dataclass(frozen=True, slots=True)
class Share:
    """What of one step is a row's: the tokens from position `start` on, which are the last
    `count` columns of the step."""

    row: Row
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    def of(self, batch: Tensor) -> Tensor:
        """`[heads, count, dim]` of a step's `[batch, heads, columns, dim]`, in CPU memory."""
        return batch[self.row.index, :, batch.shape[2] - self.count :].detach().cpu()


def new_tokens(
    input_ids: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    before: Listed[int],
    columns: int,
) -> list[list[int]]:
    """The ids that each row of `input_ids` [batch, new columns] brings, padding left out.

    `mask`: [batch, all columns up to now], 0 where there is padding; `before`: tokens of each row
    so far, in `columns`. Refused where a row is padded elsewhere than at its left, and where a
    token would be stored as of another position than the model computes it for.
    """
    batch, new = input_ids.shape
    real = _real(mask, batch, columns, new)
    seen = real[:, :columns].sum(1).tolist()
    if seen != list(before):
        raise Refused(
            f"an attention mask with {seen} earlier tokens in its rows, where the cache has seen "
            f"{list(before)}; give each token once, and the mask of all of them"
        )
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise Refused("padding behind a token; pad at the left (padding_side='left')")
    kept = real[:, columns:]
    at = _positions(position_ids, batch, columns, new)
    for row, start in enumerate(before):
        mine = at[row][kept[row]].tolist()
        if mine != list(range(start, start + len(mine))):
            raise Refused(
                f"row {row} goes on with token {start}, at position {mine[0]} by the model; give "
                "each token once, and position_ids that leave out padding, as generate() does"
            )
    return [ids[keep].tolist() for ids, keep in zip(input_ids.cpu(), kept, strict=True)]


def _real(mask: Tensor | None, batch: int, columns: int, new: int) -> Tensor:
    """`[batch, columns and new ones]`: what is a token, and no padding."""
    shape = [batch, columns + new]
    if mask is None:
        return torch.ones(shape, dtype=torch.bool)
    if list(mask.shape) != shape:
        raise Refused(
            f"an attention mask of shape {list(mask.shape)}; give {shape}: a column for each that "
            "this cache has seen or sees now, with 0 for padding at the left"
        )
    return mask.bool().cpu()


def _positions(position_ids: Tensor | None, batch: int, columns: int, new: int) -> Tensor:
    """`[batch, new]`. None are given: the model counts columns."""
    if position_ids is None:
        return torch.arange(columns, columns + new).expand(batch, -1)
    if position_ids.ndim != 2 or position_ids.shape[1] != new:
        raise Refused(f"position ids of shape {list(position_ids.shape)}; give [{batch}, {new}]")
    return position_ids.expand(batch, -1).cpu()
