"""Cutting blocks by ranges, and stacking pieces, against the same done token by token."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvfabric.attention.masks import seen, sight, within
from kvfabric_nodes.attention.pieces import Blocks, Pieces, blocks_of, cut, joined
from kvfabric_nodes.attention.scoring import sum_of, whole_pages
from kvfabric_nodes.attention.stacking import stacks
from kvfabric_nodes.store.extents import Extent

FULL = 4  # tokens of a block


@st.composite
def ranges(draw: st.DrawFn, count: int = 4) -> list[tuple[int, int]]:
    """Ascending, not empty, some of them neighbours."""
    bounds = sorted(draw(st.sets(st.integers(0, 40), max_size=2 * count)))
    pairs = list(itertools.pairwise(bounds))
    return pairs[:: draw(st.sampled_from([1, 2]))]


@st.composite
def lying(draw: st.DrawFn) -> Blocks:
    rows, at = [], draw(st.integers(0, 3))
    for number in range(draw(st.integers(0, 8))):
        tokens = draw(st.integers(1, FULL))
        rows.append((1000 * number, at, at + tokens, Extent(1, number, 64, number)))
        at += tokens + draw(st.sampled_from([0, 0, 1, 9]))
    return blocks_of(rows)


def tokens(pairs: list[tuple[int, int]]) -> set[int]:
    return {at for first, end in pairs for at in range(first, end)}


@given(lying(), ranges())
def test_a_cut_is_what_lies_in_the_ranges_and_the_gaps_are_the_rest(
    blocks: Blocks, asked: list[tuple[int, int]]
) -> None:
    found = cut(blocks, asked)
    where = {
        at: (extent, at - first)
        for extent, first, end in zip(blocks.extents, blocks.first, blocks.end, strict=True)
        for at in range(first, end)
    }
    met: dict[int, tuple[Extent, int]] = {}
    columns = (found.extents, found.pieces.skipped, found.pieces.first, found.pieces.end)
    for extent, skipped, first, end in zip(*columns, strict=True):
        assert first < end
        met |= {at: (extent, skipped + at - first) for at in range(first, end)}
    assert met == {at: place for at, place in where.items() if at in tokens(asked)}
    assert found.pieces.tokens == len(met)
    assert all(first < end for first, end in found.gaps)
    assert found.gaps == sorted(found.gaps)
    assert tokens(found.gaps) == tokens(asked) - where.keys()
    assert sum(end - first for first, end in found.gaps) == len(tokens(found.gaps))


@given(lying(), ranges(), st.integers(0, 8))
def test_blocks_are_the_same_joined_or_not(
    blocks: Blocks, asked: list[tuple[int, int]], count: int
) -> None:
    columns = (blocks.address, blocks.first, blocks.end, blocks.extents)
    rows = list(zip(*columns, strict=True))
    both = joined(blocks_of(rows[:count]), blocks_of(rows[count:]))
    assert cut(both, asked).gaps == cut(blocks, asked).gaps
    assert both.extents == blocks.extents


@given(ranges(), ranges())
def test_ranges_within_ranges(ours: list[tuple[int, int]], theirs: list[tuple[int, int]]) -> None:
    found = within(ours, theirs)
    assert tokens(found) == tokens(ours) & tokens(theirs)
    assert all(first < end for first, end in found)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(found))


@given(
    st.lists(st.integers(0, 30), max_size=4),
    st.integers(0, 30),
    st.integers(0, 9),
    st.integers(0, 9),
)
def test_what_no_row_sees_is_not_asked_for(
    positions: list[int], visible: int, window: int, sinks: int
) -> None:
    rows = sight(len(positions) or 1, positions, visible, window, sinks)
    every = {at for at in range(40) for row in range(len(rows.hi)) if rows.sees(row, at)}
    asked = tokens(seen(rows))
    assert every <= asked
    low = min(rows.lo)
    assert asked - every <= set(range(low, max(rows.hi)))  # only what lies between its rows


@given(st.lists(st.lists(st.integers(0, 9), unique=True).map(sorted), min_size=1, max_size=6))
def test_every_piece_of_every_query_is_in_one_stack(owned: list[list[int]]) -> None:
    numbers = [np.array(one, np.int64) for one in owned]
    pieces = [
        Pieces(100 * one, one % 3, one // 2 * 8, one // 2 * 8 + 1 + one % 2) for one in numbers
    ]
    made = stacks(pieces)
    for query, own in enumerate(owned):
        stacked = [stack.pieces for stack in made if query in stack.queries]
        address = np.concatenate([np.empty(0, np.int64), *(one.address for one in stacked)])
        assert sorted(address.tolist()) == [100 * number for number in own]
    for number in {number for own in owned for number in own}:
        holding = [stack for stack in made if 100 * number in stack.pieces.address]
        assert len(holding) == 1
        assert holding[0].queries == [i for i, own in enumerate(owned) if number in own]
    assert len({tuple(stack.queries) for stack in made}) == len(made)


@given(lying(), ranges(), st.sampled_from([1, 2, 4]))
def test_whole_pages_are_kept_and_what_is_in_part_is_missing(
    blocks: Blocks, asked: list[tuple[int, int]], page: int
) -> None:
    found = cut(blocks, asked)
    kept = whole_pages(found, page)
    here = tokens(list(zip(found.pieces.first, found.pieces.end, strict=True)))
    inside = tokens(list(zip(kept.pieces.first, kept.pieces.end, strict=True)))
    assert inside <= here
    assert not (kept.pieces.first % page).any()
    assert not (kept.pieces.end % page).any()
    assert tokens(kept.gaps) == tokens(asked) - inside
    assert all(before[1] < after[0] for before, after in itertools.pairwise(kept.gaps))
    if page == 1:
        assert inside == here


@given(lying(), st.lists(st.integers(0, 40)))
def test_a_sum_takes_each_token_from_its_block(blocks: Blocks, positions: list[int]) -> None:
    weights = np.arange(len(positions), dtype=np.float32)
    found = sum_of(blocks, np.array(positions, np.int64), weights)
    where = {
        at: (address, at - first)
        for address, first, end in zip(blocks.address, blocks.first, blocks.end, strict=True)
        for at in range(first, end)
    }
    wanted = [(*where[at], i) for i, at in enumerate(positions) if at in where]
    assert list(zip(found.blocks, found.places, found.weights, strict=True)) == wanted
    assert tokens(found.gaps) == set(positions) - where.keys()
