"""Random histories of sequences and their forks, on a real node, against plain numpy arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from numpy.typing import NDArray

import kvfabric_client
from kvfabric.types import Format, Namespace
from kvfabric_client import Room
from kvfabric_client.sequence import Sequence
from kvfabric_nodes.node import Node

from .conftest import address, core_of

FORM = Format("float32", block_tokens=4, layers=2, kv_heads=1, head_dim=2)
MAX_TOKENS = 30
MAX_LIVING = 4

Floats = NDArray[np.float32]


class Living:
    """A sequence beside its twin: token ids, and what was appended, per layer."""

    def __init__(self, sequence: Sequence, ids: list[int], floats: Floats) -> None:
        self.sequence = sequence
        self.ids = ids
        self.floats = floats
        self.forks: list[Living] = []
        self.parent: Living | None = None

    @property
    def length(self) -> int:
        return len(self.ids)


class Histories(RuleBasedStateMachine):
    room: Room
    node: Node

    def __init__(self) -> None:
        super().__init__()
        self.living: list[Living] = []
        self.open()

    def pick(self, number: int) -> Living:
        return self.living[number % len(self.living)]

    @rule()
    def open(self) -> None:
        if len(self.living) < MAX_LIVING:
            empty = kv_of_chain([])
            self.living.append(Living(self.room.sequence(FORM), [], empty))

    @rule(
        which=st.integers(0, 9),
        ids=st.lists(st.integers(0, 2), min_size=1, max_size=9),
        by_layer=st.booleans(),
        again=st.integers(0, 3),
    )
    def append(self, which: int, ids: list[int], by_layer: bool, again: int) -> None:
        """Few tokens, so that sequences often share blocks by chance; `again`: told twice."""
        one = self.pick(which)
        if one.length + len(ids) > MAX_TOKENS:
            return
        # Equal chains must have equal KV: that is what a key promises.
        whole = one.ids + ids
        floats = kv_of_chain(whole)
        first = max(0, one.length - again)
        if by_layer:
            for layer in range(FORM.layers):
                one.sequence.append(
                    whole[first:], floats[layer, ..., first:, :], layer=layer, start=first
                )
        else:
            one.sequence.append(whole[first:], floats[..., first:, :], start=first)
        one.ids, one.floats = whole, floats

    @rule(which=st.integers(0, 9), keep=st.integers(0, MAX_TOKENS))
    def truncate(self, which: int, keep: int) -> None:
        one = self.pick(which)
        keep = min(keep, one.length)
        if one.parent is not None:
            return
        one.sequence.truncate(keep)
        one.ids, one.floats = one.ids[:keep], one.floats[..., :keep, :]

    @rule(which=st.integers(0, 9), at=st.integers(0, MAX_TOKENS), tentative=st.booleans())
    def fork(self, which: int, at: int, tentative: bool) -> None:
        one = self.pick(which)
        if len(self.living) >= MAX_LIVING or one.parent is not None:
            return
        at = min(at, one.length)
        fork = one.sequence.fork(at, tentative=tentative)
        other = Living(fork, one.ids[:at], one.floats[..., :at, :])
        if tentative:
            other.parent = one
            one.forks.append(other)
        self.living.append(other)

    @rule(which=st.integers(0, 9), less=st.integers(0, 3))
    def accept(self, which: int, less: int) -> None:
        fork = self.pick(which)
        if fork.parent is None:
            return
        parent = fork.parent
        keep = max(fork.sequence.sealed, fork.length - less)
        parent.sequence.accept(fork.sequence, keep)
        parent.ids, parent.floats = fork.ids[:keep], fork.floats[..., :keep, :]
        self.forget(parent.forks)
        parent.forks = []

    @rule(which=st.integers(0, 9))
    def seal(self, which: int) -> None:
        one = self.pick(which)
        if one.parent is None:
            assert one.sequence.seal() == one.length

    @rule(which=st.integers(0, 9), drop=st.booleans())
    def close(self, which: int, drop: bool) -> None:
        one = self.pick(which)
        if len(self.living) == 1:
            return
        one.sequence.close(drop=drop)
        if one.parent is not None:
            one.parent.forks.remove(one)
        self.forget([one, *one.forks])
        assert self.living or self.open() is None

    def forget(self, gone: list[Living]) -> None:
        self.living = [one for one in self.living if one not in gone]
        if not self.living:
            self.open()

    @invariant()
    def everything_is_read_back(self) -> None:
        for one in self.living:
            assert one.sequence.length == one.length
            assert list(one.sequence.token_ids) == one.ids
            assert np.array_equal(one.sequence.read(), one.floats)
            one.sequence.writer.outline.check()

    def teardown(self) -> None:
        for one in self.living:
            one.sequence.close(drop=True)
        self.node.check()


def kv_of_chain(ids: list[int]) -> Floats:
    """KV of each token that all tokens before it decide, as a model makes it."""
    shape = (FORM.layers, 2, FORM.kv_heads, len(ids), FORM.head_dim)
    history = np.cumsum(np.array(ids, dtype=np.float32) * 3.0 + 1.0)
    floats = np.zeros(shape, dtype=np.float32) + history[None, None, None, :, None]
    for layer in range(FORM.layers):
        floats[layer, 0] += layer * 1000
        floats[layer, 1] += layer * 1000 + 500
    return floats


@pytest.fixture(params=["unix", "tcp"])
def machine(request: pytest.FixtureRequest, node: Node) -> Iterator[type[Histories]]:
    home = address(node, request.param)
    with contextlib.closing(kvfabric_client.connect(home, timeout_s=20)) as client:
        room = client.open(Namespace("default", b"f" * 32))
        given = {"room": room, "node": node}
        yield type("HistoriesHere", (Histories,), given)
        shards = core_of(node).shards
        assert not any(shards.claims(room.id, key) for key in shards.room(room.id))


def test_whatever_is_appended_forked_and_cut_is_read_back(machine: type[Histories]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
