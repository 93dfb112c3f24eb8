"""Attention over any split of the keys merges to attention in one piece."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfabric.attention.floats import narrowed, widened
from kvfabric.attention.masks import Sight, sight
from kvfabric.attention.merge import Partial, combine, merge
from kvfabric.attention.oracle import Array, attend
from kvfabric.errors import Refused

# Units of float32's rounding: each part's o and lse are rounded once (the oracle's), each weight
# and each product once more, and the sum over parts as often as there are parts.
EPS = float(np.finfo(np.float32).eps)


def _inputs(seed: int, rows: int, tokens: int, dim: int = 8) -> tuple[Array, Array, Array, Array]:
    random = np.random.default_rng(seed)
    queries = random.normal(size=(rows, 4, dim)) * random.choice([0.1, 1.0, 5.0])
    keys = random.normal(size=(tokens, 2, dim))
    values = random.normal(size=(tokens, 2, dim))
    return queries, keys, values, np.arange(tokens)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 200),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    rows=st.integers(1, 3),
)
def test_a_merge_over_any_split_is_attention_in_one_piece(
    seed: int, tokens: int, cuts: list[int], rows: int
) -> None:
    queries, keys, values, positions = _inputs(seed, rows, tokens)
    seen = sight(rows, [], tokens)
    ends = [0, *sorted(min(cut, tokens) for cut in cuts), tokens]  # parts may be empty
    parts = [
        attend(queries, keys[a:b], values[a:b], positions[a:b], seen, 0.35)
        for a, b in itertools.pairwise(ends)
    ]
    whole = attend(queries, keys, values, positions, seen, 0.35)
    merged = merge(parts)
    most = float(np.abs(values).max())
    assert np.abs(merged.o - whole.o).max() <= (4 + len(parts)) * EPS * most
    assert (np.abs(merged.lse - whole.lse) <= 4 * EPS * (1 + np.abs(whole.lse))).all()


@given(seed=st.integers(0, 2**32 - 1), window=st.integers(1, 40), sinks=st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_a_windows_parts_merge_too(seed: int, window: int, sinks: int) -> None:
    queries, keys, values, positions = _inputs(seed, 3, 60)
    seen = sight(3, [57, 58, 59], 60, window, sinks)
    parts = [
        attend(queries, keys[a : a + 7], values[a : a + 7], positions[a : a + 7], seen, 1.0)
        for a in range(0, 60, 7)
    ]
    whole = attend(queries, keys, values, positions, seen, 1.0)
    assert np.allclose(merge(parts).o, whole.o, atol=1e-5)
    kept = [t for t in range(60) if seen.sees(1, t)]
    assert kept == [t for t in range(60) if t <= 58 and (t > 58 - window or t < sinks)]


def test_a_row_that_sees_nothing_anywhere_is_refused_by_its_number() -> None:
    empty = Partial(np.zeros((2, 1, 4), np.float32), np.full((2, 1), -np.inf, np.float32))
    some = Partial(empty.o + 1, np.array([[0.0], [-np.inf]], np.float32))
    with pytest.raises(Refused, match="query row 1"):
        merge([empty, some])
    left = combine([empty, some])
    assert left.lse[1, 0] == -np.inf
    assert (left.o[1] == 0).all()
    with pytest.raises(Refused, match="no parts"):
        merge([])


def test_equal_infinite_logits_do_not_hide_behind_a_number() -> None:
    """A damaged key shows as NaN, as it would in one piece."""
    part = Partial(np.full((1, 1, 2), np.nan, np.float32), np.full((1, 1), np.nan, np.float32))
    good = Partial(np.ones((1, 1, 2), np.float32), np.zeros((1, 1), np.float32))
    assert np.isnan(combine([part, good]).o).all()


def test_positions_are_none_or_one_per_row() -> None:
    with pytest.raises(Refused, match="2 positions for 3"):
        sight(3, [1, 2], 5)
    assert sight(2, [], 5).hi.tolist() == [5, 5]
    assert isinstance(sight(1, [4], 9, window=2), Sight)


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_bfloat16_is_rounded_to_the_nearest_and_widened_exactly(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    back = widened(narrowed(values, "bfloat16"), "bfloat16")
    finite = np.isfinite(values) & np.isfinite(back)
    normal = np.abs(values) >= np.finfo(np.float32).tiny
    some = finite & normal
    assert (np.abs(back[some] - values[some]) <= np.abs(values[some]) * 2.0**-8).all()
    assert (np.isnan(back) == np.isnan(values)).all()
    assert (
        narrowed(back, "bfloat16")[~np.isnan(back)] == narrowed(values, "bfloat16")[~np.isnan(back)]
    ).all()
