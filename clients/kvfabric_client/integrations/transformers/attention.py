"""The attention function that transformers calls by the name "kvfabric", and its mask.

Neither knows of the fabric: a `Step`, which a cache sets for the time of one forward call of its
model, is handed each layer's queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kvfabric.errors import Refused, Unsupported
from kvfabric_client.integrations.transformers.local import Scores, Tensor

NAME = "kvfabric"
OTHER_MASK = "a mask other than causal, windows and padding at the left is not known to the fabric"


class Step(Protocol):
    """One forward call over some tokens."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        """`query` [batch, query heads, columns, dim], `key` and `value` [batch, KV heads, columns,
        dim] of the step's own tokens, as they are to be stored. Answers [batch, columns, query
        heads, dim], zeros for padding."""


_STEP: ContextVar[Step | None] = ContextVar("kvfabric_step", default=None)


@contextmanager
def under_way(step: Step) -> Iterator[None]:
    """Forward calls inside are this step's; they may be nested."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def register() -> None:
    """Makes the name known to transformers. Safe to repeat."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers' other attention functions; keywords that do not change a score are left
    aside."""
    step = _STEP.get()
    if step is None:
        raise Refused(
            "this model's attention is the fabric's, but the call brought no cache of it; pass "
            "past_key_values=... of fabric_attention(), or set another attn_implementation"
        )
    if attention_mask is not None:
        raise Unsupported(
            "a mask other than causal, padding and window; pass it as [batch, tokens]"
        )
    if s_aux is not None:
        raise Unsupported("learned attention sinks (s_aux) are not attended on the fabric")
    if dropout or query.requires_grad:
        raise Unsupported("the fabric is for inference; use model.eval() and torch.no_grad()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = Scores(scale, softcap or 0.0, sliding_window or 0)
    return step.attend(module.layer_idx, query, key, value, scores), None


def _mask(*, allow_is_causal_skip: bool = True, use_vmap: bool = False, **_: Any) -> None:
    """None: rows know what they see. Unsupported for a pattern of somebody's own."""
    if use_vmap or not allow_is_causal_skip:
        raise Unsupported(OTHER_MASK)
