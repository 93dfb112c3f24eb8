"""Attention over new tokens, here, against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfabric.attention.masks import sight
from kvfabric.attention.oracle import attend as oracle
from kvfabric_client.attention import local
from kvfabric_client.attention.local import attend_new


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (8, 1)]),
    start=st.integers(0, 50),
    window=st.integers(0, 6),
    sinks=st.integers(0, 3),
    softcap=st.sampled_from([0.0, 5.0]),
)
def test_new_tokens_are_attended_causally(
    seed: int,
    rows: int,
    heads: tuple[int, int],
    start: int,
    window: int,
    sinks: int,
    softcap: float,
) -> None:
    random, (query_heads, kv_heads) = np.random.default_rng(seed), heads
    q = random.normal(size=(rows, query_heads, 8)).astype(np.float32)
    k, v = random.normal(size=(2, kv_heads, rows, 8)).astype(np.float32)
    at = np.arange(start, start + rows)
    seen = sight(rows, at, start + rows, window, sinks)
    got = attend_new(q, k, v, at, seen, 0.3, softcap)
    want = oracle(q, k.transpose(1, 0, 2), v.transpose(1, 0, 2), at, seen, 0.3, softcap)
    assert np.allclose(got.o, want.o, rtol=1e-5, atol=1e-5)
    assert np.allclose(got.lse, want.lse, rtol=1e-5, atol=1e-5)


def test_many_rows_are_attended_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    q = random.normal(size=(37, 4, 8)).astype(np.float32)
    k, v = random.normal(size=(2, 2, 37, 8)).astype(np.float32)
    at = np.arange(37)
    whole = attend_new(q, k, v, at, sight(37, at, 37), 0.3)
    monkeypatch.setattr(local, "LOGIT_BYTES", 4 * 4 * 37 * 5)
    pieces = attend_new(q, k, v, at, sight(37, at, 37), 0.3)
    assert np.allclose(whole.o, pieces.o, atol=1e-6)
    assert np.allclose(whole.lse, pieces.lse, atol=1e-6)


def test_rows_that_see_nothing_are_empty() -> None:
    q = np.ones((2, 2, 4), np.float32)
    kv = np.ones((1, 1, 4), np.float32)
    got = attend_new(q, kv, kv, np.array([5]), sight(2, [4, 5], 6), 1.0)
    assert not got.o[0].any()
    assert (got.lse[0] == -np.inf).all()
    assert (got.lse[1] > -np.inf).all()


@pytest.mark.parametrize("plane", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_none_reaches_the_rows_that_see_it_and_no_others(
    plane: int, bad: float
) -> None:
    random = np.random.default_rng(0)
    q = random.normal(size=(7, 6, 8)).astype(np.float32)
    kv = random.normal(size=(2, 2, 7, 8)).astype(np.float32)
    at = np.arange(7)
    whole = attend_new(q, kv[0], kv[1], at, sight(7, at, 7), 0.3)
    kv[plane, 1, 4] = bad
    got = attend_new(q, kv[0], kv[1], at, sight(7, at, 7), 0.3)
    spoiled = np.zeros((7, 6), bool)
    spoiled[4:, 3:] = True
    assert np.array_equal(got.o[~spoiled], whole.o[~spoiled])
    assert not np.isfinite(got.o[spoiled]).any()
