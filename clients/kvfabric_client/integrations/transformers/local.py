"""Attention over what the engine's own process holds: the tokens of this step, and its newest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvfabric.attention.merge import Partial

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer's logits are made: `softcap` 0 and `window` 0 are none."""

    scale: float
    softcap: float = 0.0
    window: int = 0


def causal(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Partial:
    """Of `query` [query heads, rows, dim] over `key` and `value` [KV heads, tokens, dim], the last
    tokens being the rows' own: each row sees up to its own."""
    heads = len(key)
    grouped = query.reshape(heads, -1, *query.shape[1:])
    inside = _flash if _has_flash(query, scores) else _plain
    o, lse = inside(grouped, key[:, None], value[:, None], scores)
    rows_first = o.flatten(0, 1).transpose(0, 1), lse.flatten(0, 1).transpose(0, 1)
    return Partial(*(one.float().contiguous().cpu().numpy() for one in rows_first))


def _has_flash(query: Tensor, scores: Scores) -> bool:
    return query.device.type == "cpu" and not scores.softcap


def _flash(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """torch's own, whose dispatcher does not return the lse. Heads of a group share their keys by
    a stride of 0."""
    group, rows, tokens = query.shape[1], query.shape[2], key.shape[2]
    hidden = _hidden(rows, tokens, scores.window, query.device)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
        query,
        key.expand(-1, group, -1, -1),
        value.expand(-1, group, -1, -1),
        attn_mask=torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, -torch.inf),
        scale=scores.scale,
    )
    return o, lse


def _plain(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """As the formula says, in float32."""
    logits = (query.float() * scores.scale) @ key.float().transpose(-1, -2)
    if scores.softcap:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    hidden = _hidden(query.shape[2], key.shape[2], scores.window, query.device)
    logits.masked_fill_(hidden, -torch.inf)
    lse = logits.logsumexp(-1)
    return torch.exp(logits - lse[..., None]) @ value.float(), lse


def _hidden(rows: int, tokens: int, window: int, device: torch.device) -> Tensor:
    """`[rows, tokens]`: what a row does not see. Its own token it always sees."""
    at = torch.arange(tokens - rows, tokens, device=device)[:, None]
    seen = torch.arange(tokens, device=device)
    hidden = seen > at
    return hidden | (seen <= at - window) if window else hidden
