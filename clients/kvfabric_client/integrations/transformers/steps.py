"""One call of the model, layer by layer: what is asked of the fabric, and what is handed to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvfabric_client.integrations.transformers.local import Scores, Tensor, causal
from kvfabric_client.integrations.transformers.mending import Ask, Mender
from kvfabric_client.integrations.transformers.newest import Newest, Run
from kvfabric_client.integrations.transformers.rows import Share


class Forward:
    """A call that brings new tokens. Nothing of them is kept, save the newest."""

    def __init__(self, shares: Sequence[Share], mender: Mender, newest: Newest) -> None:
        self.shares = shares
        self._mender = mender
        self._newest = newest

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        """See `attention.Step`."""
        batch, heads, columns, _ = query.shape
        runs = [
            self._newest.with_new(share, layer, Run(share.start, share.of(key), share.of(value)))
            for share in self.shares
        ]
        asks = [
            self._ask(share, share.of(query), run, scores)
            for share, run in zip(self.shares, runs, strict=True)
        ]
        out = query.new_zeros(batch, columns, heads, value.shape[-1])
        if not self.shares:  # padding alone
            return out
        for share, o in zip(self.shares, self._mender.attend(asks, layer, scores), strict=True):
            out[share.row.index, columns - share.count :] = torch.from_numpy(o)
        if self._newest.tokens:
            for share, run in zip(self.shares, runs, strict=True):
                at = self._newest.leaves(run)
                self._mender.append(share.row, layer, run.cut(run.start, at))
                self._newest.keep(share, layer, run.cut(at, run.end))
        return out

    def _ask(self, share: Share, query: Tensor, run: Run, scores: Scores) -> Ask:
        if not self._newest.tokens:
            return Ask(
                share.row, query, share.start, visible=share.start, stored=share.end, new=run
            )
        return Ask(
            share.row,
            query,
            share.start,
            visible=run.start,
            local=lambda: causal(query, run.key, run.value, scores),
            stored=self._newest.leaves(run),
        )

    def undo(self) -> None:
        """The call failed: its tokens were not taken."""
        for share in self.shares:
            del share.row.token_ids[share.start :]
            share.row.failed = True
