"""Who is asked for which tokens: whatever happened, every token of exactly one node."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfabric.attention.masks import within
from kvfabric.types import Key
from kvfabric_client.attention.route import HOME, Route, touched
from kvfabric_client.attention.runs import Runs, count, joined, without

NODES = (HOME, "tcp:a", "tcp:b")


@dataclass(frozen=True, slots=True)
class Sealed:
    key: Key
    start: int
    end: int


def blocks_of(sizes: list[int], version: int = 0) -> list[Sealed]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [
        Sealed(Key(b"%d %d" % (version, end)), end - size, end)
        for size, end in zip(sizes, ends, strict=True)
    ]


tokens = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6)


def members(runs: Runs) -> set[int]:
    return {token for first, end in runs for token in range(first, end)}


@given(ours=tokens, theirs=tokens)
def test_runs_are_sets(ours: Runs, theirs: Runs) -> None:
    a, b = joined(ours), joined(theirs)
    assert members(a) == members(ours)
    assert count(a) == len(members(ours))
    assert all(first < end for first, end in a)
    assert all(x[1] < y[0] for x, y in itertools.pairwise(a))
    assert members(without(a, b)) == members(a) - members(b)
    assert members(within(a, b)) == members(a) & members(b)


class History:
    """A context that grows by blocks, has some moved, and is cut."""

    def __init__(self) -> None:
        self.route = Route()
        self.blocks: list[Sealed] = []
        self.version = 0

    def seal(self, size: int) -> None:
        start = self.blocks[-1].end if self.blocks else 0
        key = Key(b"%d %d" % (self.version, start))
        self.blocks.append(Sealed(key, start, start + size))

    def move(self, index: int, node: int) -> None:
        if self.blocks:
            at = index % len(self.blocks)
            self.route.assign(at, self.blocks[at].key, NODES[node])

    def cut(self, index: int, _: int) -> None:
        del self.blocks[index % (len(self.blocks) + 1) :]
        self.version += 1  # what comes now has other keys
        self.seal(3)
        self.route.recheck(self.blocks)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("seal"), st.integers(1, 4), st.just(0)),
        st.tuples(st.just("move"), st.integers(0, 20), st.integers(0, 2)),
        st.tuples(st.just("cut"), st.integers(0, 20), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(steps=steps, wanted=tokens, tail=st.integers(0, 5))
def test_every_token_is_asked_of_exactly_one_node(
    steps: list[tuple[str, int, int]], wanted: Runs, tail: int
) -> None:
    history = History()
    last: dict[Key, str] = {}
    for what, number, node in steps:
        if what == "seal":
            history.seal(number)
        else:
            getattr(history, what)(number, node)
            if what == "move" and history.blocks:
                last[history.blocks[number % len(history.blocks)].key] = NODES[node]
        history.route.plan([(0, 100)], history.blocks)  # what it remembers must not be stale
    runs = joined([*wanted, (0, tail)])
    asked = history.route.plan(runs, history.blocks)
    by_node = [members(some) for some in asked.values()]
    assert sum(map(len, by_node)) == len(set().union(*by_node)) == count(runs)
    assert set().union(*by_node) == members(runs)
    for block in history.blocks:
        here = asked.get(last.get(block.key, HOME), [])
        assert members(within(runs, [(block.start, block.end)])) <= members(here)


@given(sizes=st.lists(st.integers(1, 4), max_size=8), wanted=tokens)
def test_blocks_that_have_some_of_the_tokens(sizes: list[int], wanted: Runs) -> None:
    blocks, runs = blocks_of(sizes), joined(wanted)
    assert touched(blocks, runs) == [
        i for i, b in enumerate(blocks) if members(runs) & set(range(b.start, b.end))
    ]


def test_what_was_cut_is_asked_of_its_home_again() -> None:
    route, old, new = Route(), blocks_of([4, 4, 4]), blocks_of([4, 4, 4], version=1)
    for index, block in enumerate(old):
        route.assign(index, block.key, "tcp:a")
    assert route.plan([(0, 14)], old) == {"tcp:a": [(0, 12)], HOME: [(12, 14)]}
    mixed = [*old[:1], *new[1:2]]
    route.recheck(mixed)
    assert route.plan([(0, 14)], mixed) == {"tcp:a": [(0, 4)], HOME: [(4, 14)]}
    route.assign(0, old[0].key, HOME)
    assert route.plan([(0, 14)], mixed) == {HOME: [(0, 14)]}


@pytest.mark.parametrize("wanted", [[], [(5, 5)]])
def test_nothing_is_asked_of_nobody(wanted: Runs) -> None:
    assert Route().plan(joined(wanted), []) == {}
