"""Top-k and weighted sums over one context: what retrieval needs of keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kvfabric.attention.merge import Floats
from kvfabric.attention.shape import AttentionShape
from kvfabric_client.attention.answers import Best, Traffic
from kvfabric_client.attention.best import TopK, whole_pages
from kvfabric_client.attention.context import Context
from kvfabric_client.attention.gather import Gather
from kvfabric_client.attention.operator import Item
from kvfabric_client.attention.parts import Options, Part
from kvfabric_client.attention.queries import positions_of, vectors_of
from kvfabric_client.attention.runs import Runs, joined
from kvfabric_client.attention.summing import Reduce, Sum
from kvfabric_client.deadline import Deadline
from kvfabric_client.sequence_reads import Missing


def best_of(
    context: Context,
    shape: AttentionShape,
    queries: Any,
    k: int,
    *,
    layer: int,
    page_tokens: int,
    values: bool,
    tokens: Runs,
    deadline: Deadline,
) -> list[Best]:
    """Per row its best of these tokens, or of the whole pages among them. Raises Missing."""
    vectors, dtype = vectors_of(queries, shape, values=values)
    shape.check_heads(vectors.shape[1])
    if page_tokens:
        tokens = whole_pages(context.source.blocks, tokens, page_tokens)
    visible = tokens[-1][1] if tokens else 0
    at = positions_of(None, len(vectors))
    part = Part(context, shape, vectors, dtype, visible, at, tokens)
    operator = TopK([part], Options(layer, 1.0), k, page_tokens, values)
    gather = Gather(operator, _value_dim(context, shape), Traffic(), deadline)
    _check(gather.run(operator.items()))
    return operator.best(part)


def reduced(
    context: Context,
    shape: AttentionShape,
    sums: Sequence[Sum],
    *,
    layer: int,
    values: bool,
    deadline: Deadline,
) -> Floats:
    """[sums, KV heads, dim]. Raises Missing."""
    operator = Reduce(context, shape, sums, layer, values)
    gather = Gather(operator, _value_dim(context, shape), Traffic(), deadline)
    _check(gather.run(operator.items()))
    return operator.outputs


def _value_dim(context: Context, shape: AttentionShape) -> int:
    """As spans name it: of latents only."""
    return shape.value_dim if context.source.shape.kind == "mla" else 0


def _check(lost: Iterable[tuple[Item, Runs]]) -> None:
    missing = joined(run for _, runs in lost for run in runs)
    if missing:
        raise Missing([range(*run) for run in missing])
