"""Sparse attention: the pages that score best are attended exactly, and the result says so."""

from __future__ import annotations

import numpy as np
import pytest

from kvfabric.errors import Refused
from kvfabric_client import Pages, Sequence

from .lending import FORM, TOKENS, right
from .numbers import Array, check, expected, random_queries

QUERY = random_queries(1, 4, FORM.head_dim)


def best_pages(
    kv: Array, layer: int, queries: Array, tokens: int, end: int, count: int
) -> list[int]:
    """By brute force: first tokens of the pages with the greatest score."""
    keys = kv[layer, 0, :, :end].reshape(FORM.kv_heads, -1, tokens, FORM.head_dim).mean(axis=2)
    group = queries.shape[1] // FORM.kv_heads
    scores = np.einsum("rhd,hpd->rhp", queries, np.repeat(keys, group, axis=0)).max(axis=(0, 1))
    return sorted((tokens * np.argsort(-scores, kind="stable")[:count]).tolist())


@pytest.mark.parametrize("tokens", [8, 16])
def test_the_best_pages_and_the_open_tokens(lent: Sequence, kv: Array, tokens: int) -> None:
    right(lent, kv)
    known, sealed = kv[..., :TOKENS, :], lent.sealed
    got = lent.attend(QUERY, layer=1, pages=Pages(20, tokens))
    chosen = [range(p, p + tokens) for p in best_pages(known, 1, QUERY, tokens, sealed, 20)]
    only = [*chosen, range(sealed, TOKENS)]
    check(got, expected(lent.shape, known, 1, QUERY, only=only))
    attended = 20 * tokens + TOKENS - sealed
    assert got.approximate
    assert sum(got.tokens.values()) == attended
    assert got.share == attended / TOKENS
    whole = lent.attend(QUERY, layer=1, pages=Pages(4096, tokens))
    check(whole, expected(lent.shape, known, 1, QUERY))
    assert not whole.approximate


def test_new_tokens_are_always_attended(lent: Sequence, kv: Array) -> None:
    known, sealed = kv[..., : TOKENS + 1, :], lent.sealed
    new = ([TOKENS], *kv[0, ..., TOKENS : TOKENS + 1, :])
    got = lent.attend(QUERY, layer=0, new=new, pages=Pages(3, 16))
    chosen = [range(p, p + 16) for p in best_pages(known, 0, QUERY, 16, sealed, 3)]
    only = [*chosen, range(sealed, TOKENS + 1)]
    check(got, expected(lent.shape, known, 0, QUERY, only=only))


def test_the_best_tokens_of_a_sequence(lent: Sequence, kv: Array) -> None:
    (best,) = lent.top_k(QUERY, 30, layer=1)
    keys = np.repeat(kv[1, 0, :, :TOKENS], 2, axis=0)
    scores = np.einsum("hd,htd->ht", QUERY[0], keys).max(axis=0)
    assert best.first_tokens == np.argsort(-scores, kind="stable")[:30].tolist()
    (pages,) = lent.top_k(QUERY, 5, layer=1, page_tokens=8)
    assert sorted(pages.first_tokens) == best_pages(kv, 1, QUERY, 8, lent.sealed, 5)


def test_pages_that_do_not_divide_a_block_are_refused(lent: Sequence) -> None:
    with pytest.raises(Refused, match="must divide"):
        lent.attend(QUERY, layer=0, pages=Pages(3, 12))
    with pytest.raises(Refused, match="give a count"):
        lent.attend(QUERY, layer=0, pages=Pages(3, 0))
