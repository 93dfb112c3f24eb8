"""TopK and Reduce over a real node, against the same in float64 over all that was appended."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.unit.nodes.attention.asking import Asker, Query, ids, kv

from kvfabric.attention.floats import narrowed, widened
from kvfabric.errors import Refused
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Format
from kvfabric_client import Sequence

Array = NDArray[Any]
FORM = Format("float32", block_tokens=16, layers=2, kv_heads=2, head_dim=8)
TOKENS = 150


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def form(request: pytest.FixtureRequest) -> Format:
    return Format(request.param, block_tokens=16, layers=2, kv_heads=2, head_dim=8)


@pytest.fixture
def context(form: Format) -> Array:
    return kv(form, TOKENS)


@pytest.fixture
def sequence(ask: Asker, form: Format, context: Array) -> Iterator[Sequence]:
    with ask.room.sequence(form) as made:
        made.append(ids(TOKENS), context)
        yield made


def vectors(form: Format, rows: int, group: int = 3) -> Array:
    shape = (rows, form.kv_heads * group, form.head_dim)
    return np.random.default_rng(rows).standard_normal(shape, np.float32)


def top(form: Format, queries: list[Query], **fields: Any) -> node_pb2.TopKRequest:
    heads = queries[0].vectors.shape[1]
    every = np.concatenate([query.vectors for query in queries])
    return node_pb2.TopKRequest(
        query_heads=heads,
        queries=[query.message() for query in queries],
        vectors=narrowed(every, form.dtype).tobytes(),
        **fields,
    )


def scores(form: Format, query: Query, layer: int, page: int, *, values: bool) -> Array:
    """[rows, pages]: greatest over heads of the inner product with the page's mean."""
    plane = widened(query.context[layer, int(values)], form.dtype).astype(np.float64)
    pages = plane.shape[1] // page
    means = plane[:, : pages * page].reshape(form.kv_heads, pages, page, -1).mean(2)
    q = widened(narrowed(query.vectors, form.dtype), form.dtype).astype(np.float64)
    heads = np.repeat(means, q.shape[1] // form.kv_heads, 0)
    found = np.einsum("rhd,hpd->rhp", q, heads).max(1)
    return np.asarray(found)


def rows_of(answer: node_pb2.TopKResponse) -> list[tuple[list[int], list[float]]]:
    ends = np.cumsum([0, *answer.counts])
    return [
        (list(answer.first_tokens[a:b]), list(answer.scores[a:b]))
        for a, b in itertools.pairwise(ends)
    ]


@pytest.mark.parametrize("page", [0, 1, 4, 16])
@pytest.mark.parametrize("values", [False, True])
def test_the_best_are_those_with_the_greatest_product(
    ask: Asker, form: Format, sequence: Sequence, context: Array, page: int, values: bool
) -> None:
    span = ask.span_of(form, sequence.id)
    whole = TOKENS // (page or 1) * (page or 1)
    query = Query(span, vectors(form, 3), whole, context)
    answer = ask.say("top_k", top(form, [query], layer=1, k=7, page_tokens=page, values=values))
    expected = scores(form, query, 1, page or 1, values=values)
    assert not answer.gaps
    assert list(answer.counts) == [min(7, expected.shape[1])] * 3
    for (first, found), wanted in zip(rows_of(answer), expected, strict=True):
        order = np.argsort(-wanted, kind="stable")[:7]
        assert first == (order * (page or 1)).tolist()
        np.testing.assert_allclose(found, wanted[order], rtol=1e-5, atol=1e-5)


def test_rows_see_up_to_their_position_and_a_page_in_part_is_a_gap(ask: Asker) -> None:
    context = kv(FORM, 60)
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(60), context)
        span = ask.span_of(FORM, sequence.id)
        queries = [
            Query(span, vectors(FORM, 2), 48, context, positions=[7, 47]),
            Query(span, vectors(FORM, 1), 60, context, ranges=[(2, 30), (40, 70)]),
        ]
        answer = ask.say("top_k", top(FORM, queries, k=50, page_tokens=8))
        (one, _), (two, _), (three, _) = rows_of(answer)
        assert one == [0]
        assert sorted(two) == [0, 8, 16, 24, 32, 40]
        assert sorted(three) == [8, 16, 40, 48]
        gaps = [(gap.query, gap.first_token, gap.end_token) for gap in answer.gaps]
        assert gaps == [(1, 2, 8), (1, 24, 30), (1, 56, 60)]


def test_sums_are_weighted_and_what_is_not_here_is_told(
    ask: Asker, form: Format, sequence: Sequence, context: Array
) -> None:
    keys = [place.key for place in sequence.blocks() if place.key]
    span = ask.span_of(form, sequence.id)
    part = ask.span_of_keys(form, keys=[keys[0], keys[2]], first_tokens=[0, 32]).span
    random = np.random.default_rng(3)
    tokens = [149, 3, 3, 17, *random.integers(0, TOKENS, 40).tolist()]
    weights = random.standard_normal(len(tokens)).astype(np.float32)
    request = node_pb2.ReduceRequest(layer=1, values=True)
    request.sums.add(span=span, tokens=tokens, weights=weights)
    request.sums.add(span=part, tokens=[5, 16, 40, 18, 17, 5], weights=[1, 2, 3, 4, 5, 6])
    request.sums.add(span=part)
    answer = ask.say("reduce", request)
    values = widened(context[1, 1], form.dtype).astype(np.float64)  # [heads, tokens, dim]
    found = np.frombuffer(answer.outputs, np.float32).reshape(3, form.kv_heads, form.head_dim)
    np.testing.assert_allclose(
        found[0], np.tensordot(values[:, tokens], weights, (1, 0)), atol=1e-5
    )
    np.testing.assert_allclose(found[1], 7 * values[:, 5] + 3 * values[:, 40], atol=1e-5)
    assert (found[2] == 0).all()
    gaps = [(gap.query, gap.first_token, gap.end_token) for gap in answer.gaps]
    assert gaps == [(1, 16, 19)]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"k": 0}, "the best 0"),
        ({"k": 4097}, "the best 4097"),
        ({"layer": 2}, "layer 2"),
        ({"page_tokens": 5}, "pages of 5"),
        ({"page_tokens": 32}, "pages of 32"),
        ({"query_heads": 5}, "5 query heads"),
        ({"dtype": "bfloat16"}, "queries of 'bfloat16'"),
        ({"vectors": b"x"}, "1 bytes of vectors"),
    ],
)
def test_a_top_k_that_makes_no_sense_is_refused(
    ask: Asker, fields: dict[str, Any], why: str
) -> None:
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(20), kv(FORM, 20))
        query = Query(ask.span_of(FORM, sequence.id), vectors(FORM, 1), 20, kv(FORM, 20))
        request = top(FORM, [query], k=3)
        for name, value in fields.items():
            setattr(request, name, value)
        with pytest.raises(Refused, match=why):
            ask.say("top_k", request)


@pytest.mark.parametrize(
    ("tokens", "weights", "why"),
    [
        ([1], [1, 2], "1 tokens and 2 weights"),
        ([1], [float("nan")], "no number"),
        ([1 << 60], [1], "the limit"),
        ([1] * 65537, [1] * 65537, "65537 tokens"),
    ],
)
def test_a_reduce_that_makes_no_sense_is_refused(
    ask: Asker, tokens: list[int], weights: list[float], why: str
) -> None:
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(20), kv(FORM, 20))
        request = node_pb2.ReduceRequest()
        request.sums.add(span=ask.span_of(FORM, sequence.id), tokens=tokens, weights=weights)
        with pytest.raises(Refused, match=why):
            ask.say("reduce", request)
        with pytest.raises(Refused, match="0 sums"):
            ask.say("reduce", node_pb2.ReduceRequest())
