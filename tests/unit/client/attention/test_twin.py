"""A sequence over three nodes beside the numbers it should hold, through random histories of
appends, cuts, forks, seals and moves: attention equals the oracle's after every step."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from kvfabric.rpc.v1 import control_pb2
from kvfabric_client import Client, Sequence
from kvfabric_nodes.attention.kernels import native

from .lending import FORM, SPACE, Nodes, short
from .numbers import Array, check, expected, random_queries

MOST = 4500  # more than twice what the home can hold
STEPS = 40


class Twin:
    """The sequence, its numbers, and what happens to both."""

    def __init__(self, client: Client, sequence: Sequence, chance: random.Random) -> None:
        self.client = client
        self.sequence = sequence
        self.chance = chance
        sizes = (FORM.layers, 2, FORM.kv_heads, 0, FORM.head_dim)
        self.kv: Array = np.empty(sizes, np.float32)
        self.next_id = 0
        self.asked: set[str] = set()  # nodes that attended some of it

    def fresh(self, tokens: int) -> tuple[range, Array]:
        ids = range(self.next_id, self.next_id + tokens)
        self.next_id += tokens
        sizes = (FORM.layers, 2, FORM.kv_heads, tokens, FORM.head_dim)
        return ids, np.random.default_rng(ids.start).normal(size=sizes).astype(np.float32)

    def append(self) -> None:
        tokens = self.chance.choice([3, 40, 700])
        if self.sequence.length + tokens > MOST:
            return self.cut()
        ids, kv = self.fresh(tokens)
        self.sequence.append(ids, kv)
        self.kv = np.concatenate([self.kv, kv], axis=-2)
        return None

    def cut(self) -> None:
        self.kv = self.kv[
            ..., : self.chance.randint(self.sequence.length // 2, self.sequence.length), :
        ]
        self.sequence.truncate(self.kv.shape[-2])

    def fork(self) -> None:
        """The fork goes on, its parent ends."""
        length = self.chance.randint(self.sequence.length // 2, self.sequence.length)
        fork = self.sequence.fork(length)
        self.sequence.close(drop=True)
        self.sequence, self.kv = fork, self.kv[..., :length, :]

    def attempt(self) -> None:
        fork = self.sequence.fork(tentative=True)
        ids, kv = self.fresh(5)
        fork.append(ids, kv)
        taken = self.chance.randint(0, 5)
        self.sequence.accept(fork, self.sequence.length + taken)
        self.kv = np.concatenate([self.kv, kv[..., :taken, :]], axis=-2)

    def seal(self) -> None:
        self.sequence.seal()

    def move(self) -> None:
        source, destination = self.chance.sample(["home", "east", "west"], 2)
        request = control_pb2.MigrateRequest(source=source, destination=destination)
        self.client.manager().migrate(request, self.client.deadline(10))

    def step(self, rows: int) -> None:
        ids, kv = self.fresh(rows)
        queries = random_queries(rows, 4, FORM.head_dim, seed=ids.start)
        where = range(self.sequence.length, self.sequence.length + rows)
        self.kv = np.concatenate([self.kv, kv], axis=-2)
        for layer in range(FORM.layers):
            new = (ids, *kv[layer])
            options: dict[str, Any] = self.chance.choice([{}, {"window": 500, "sinks": 4}])
            got = self.sequence.attend(queries, layer=layer, new=new, positions=where, **options)
            shape = self.sequence.shape
            check(got, expected(shape, self.kv, layer, queries, positions=where, **options))
            self.asked |= got.tokens.keys()


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (1, 2))]
)
def test_random_histories(client: Client, nodes: Nodes, seed: int) -> None:
    chance = random.Random(seed)
    twin = Twin(client, client.open(SPACE).sequence(FORM), chance)
    while twin.sequence.length < MOST // 2:
        twin.append()
    events = [twin.append] * 3 + [twin.cut, twin.fork, twin.attempt, twin.seal, twin.move]
    try:
        for _ in range(STEPS):
            chance.choice(events)()
            for rows in chance.choice([[1] * 6, [7]]):  # the six go the short way
                twin.step(rows)
        assert np.array_equal(twin.sequence.read(), twin.kv)
        assert len(twin.asked) > 1
        assert short(nodes) or not native.available()
    finally:
        twin.sequence.close(drop=True)
