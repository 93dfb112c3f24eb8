"""Banks over three nodes: what is found, summed and recalled there equals brute force here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.unit.client.conftest import Start, address, key
from tests.unit.client.test_outgrown import wait_connected, wait_for

import kvfabric_client
from kvfabric.errors import Refused
from kvfabric.manager.service import ManagerServer
from kvfabric.types import BATCH_KEYS, Format, Key, Namespace
from kvfabric_client import Bank, Client, Missing
from kvfabric_nodes.node import Node

from .numbers import random_queries

SPACE = Namespace("default", b"f" * 32)
DIM = 16
BLOCK = 64
VECTORS = 40 * BLOCK
FORM = Format("float32", block_tokens=BLOCK, layers=1, head_dim=DIM, kind="mla")
NUMBERS = np.random.default_rng(3).normal(size=(VECTORS, DIM)).astype(np.float32)
KEYS = [key(number) for number in range(1, 41)]


@pytest.fixture
def nodes(start: Start, manager: ManagerServer) -> list[Node]:
    nodes = [start(f"n{i}", manager=manager.address) for i in range(3)]
    wait_connected(*nodes)
    return nodes


@pytest.fixture
def client(nodes: list[Node]) -> Iterator[Client]:
    with kvfabric_client.connect(address(nodes[0], "unix"), timeout_s=30) as client:
        yield client


@pytest.fixture
def bank(client: Client, nodes: list[Node]) -> Iterator[Bank]:
    """A third of the vectors on each node."""
    room = client.open(SPACE)
    shards = list(NUMBERS.reshape(40, -1))
    for number, node in enumerate(nodes):
        some = slice(number, None, 3)
        room.put(KEYS[some], shards[some], at=address(node, "tcp"))
    deadline = client.deadline(30)
    wait_for(lambda: all(client.manager().places(room.id, KEYS, deadline)))
    with room.bank(FORM, KEYS) as bank:
        yield bank


def nodes_asked(bank: Bank) -> int:
    return len(bank.context._spans)


@pytest.mark.parametrize("k", [1, 32])
def test_the_best_vectors_equal_brute_force(bank: Bank, k: int) -> None:
    queries = random_queries(5, 2, DIM)
    found = bank.top_k(queries, k)
    scores = np.einsum("rhd,td->rht", queries, NUMBERS).max(axis=1)
    for row, best in enumerate(found):
        order = np.argsort(-scores[row], kind="stable")[:k]
        assert best.first_tokens == order.tolist()
        assert np.allclose(best.scores, scores[row][order], rtol=1e-5)
    assert nodes_asked(bank) == 3


def test_the_best_chunks_by_their_mean(bank: Bank) -> None:
    queries = random_queries(3, 1, DIM)
    means = NUMBERS.reshape(-1, 16, DIM).mean(axis=1)
    scores = queries[:, 0] @ means.T
    for row, best in enumerate(bank.top_k(queries, 8, page_tokens=16)):
        order = np.argsort(-scores[row], kind="stable")[:8]
        assert best.first_tokens == (16 * order).tolist()


@pytest.mark.parametrize("values", [False, True])
def test_a_weighted_sum_of_any_tokens(bank: Bank, values: bool) -> None:
    random = np.random.default_rng(1)
    tokens = random.integers(0, VECTORS, 3000)  # some of them twice
    weights = random.normal(size=3000).astype(np.float32)
    total = bank.reduce(tokens, weights, values=values)
    assert total.shape == (1, DIM)
    assert np.allclose(total[0], weights @ NUMBERS[tokens], rtol=1e-4, atol=1e-4)


def test_long_sums_go_in_several_calls(bank: Bank) -> None:
    tokens = np.arange(70_000) % VECTORS
    weights = np.full(70_000, 0.25, np.float32)
    want = np.bincount(tokens, minlength=VECTORS) * 0.25 @ NUMBERS
    assert np.allclose(bank.reduce(tokens, weights)[0], want, rtol=1e-3, atol=1e-2)


def test_attention_over_a_bank(bank: Bank) -> None:
    queries = random_queries(2, 4, DIM)
    got = bank.attend(queries, scale=1.0)
    logits = np.einsum("rhd,td->rht", queries.astype(np.float64), NUMBERS)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    want = (weights / weights.sum(-1, keepdims=True)) @ NUMBERS
    assert np.allclose(got.o, want, atol=1e-5)
    assert sum(got.tokens.values()) == VECTORS
    assert len(got.tokens) == 3


def test_what_is_deleted_is_missing_and_left_out_of_the_next_bank(
    client: Client, bank: Bank, nodes: list[Node]
) -> None:
    queries = random_queries(1, 1, DIM)
    bank.top_k(queries, 4)
    with kvfabric_client.connect(address(nodes[1], "unix")) as other:
        other.open(SPACE).purge([KEYS[1]])
    for call in (
        lambda: bank.top_k(queries, 4),
        lambda: bank.reduce([BLOCK, 0], [1.0, 1.0]),
        lambda: bank.attend(queries),
    ):
        with pytest.raises(Missing) as missing:
            call()
        assert [t for r in missing.value.ranges for t in r][:1] == [BLOCK]
        assert missing.value.ranges[-1].stop <= 2 * BLOCK
    assert np.allclose(bank.reduce([5], [2.0])[0], 2 * NUMBERS[5])
    rest = [i for i in range(40) if i != 1]
    room = client.open(SPACE)
    firsts = [BLOCK * i for i in rest]
    with room.bank(FORM, [KEYS[i] for i in rest], first_tokens=firsts) as smaller:
        (best,) = smaller.top_k(queries, 4)
    scores = NUMBERS @ queries[0, 0]
    scores[BLOCK : 2 * BLOCK] = -np.inf
    assert best.first_tokens == np.argsort(-scores, kind="stable")[:4].tolist()


def test_a_vector_that_moved_is_followed(client: Client, bank: Bank, nodes: list[Node]) -> None:
    queries = random_queries(1, 1, DIM)
    before = bank.top_k(queries, 16)
    client.manager().drain("n2", client.deadline(10))
    wait_for(lambda: client.manager().drain("n2", client.deadline(10)).empty)
    assert bank.top_k(queries, 16) == before


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda bank: bank.top_k(random_queries(1, 1, DIM), 0), "the best 0"),
        (lambda bank: bank.top_k(random_queries(1, 1, DIM + 1), 1), "query heads, 16"),
        (lambda bank: bank.top_k(random_queries(1, 1, DIM), 1, page_tokens=24), "must divide"),
        (lambda bank: bank.reduce([1, 2], [1.0]), "a weight for each"),
        (lambda bank: bank.reduce([-1], [1.0]), "a weight for each"),
    ],
)
def test_what_cannot_be_asked_is_refused(bank: Bank, call: Any, says: str) -> None:
    with pytest.raises(Refused, match=says):
        call(bank)


def test_banks_whose_shards_overlap_are_refused(client: Client) -> None:
    room = client.open(SPACE)
    with pytest.raises(Refused, match="two shards have token 70"):
        room.bank(FORM, [Key(b"a" * 32), Key(b"b" * 32)], first_tokens=[10, 70])
    with pytest.raises(Refused, match="2 keys with 1 first tokens"):
        room.bank(FORM, [Key(b"a" * 32), Key(b"b" * 32)], first_tokens=[10])
    with contextlib.closing(room.bank(FORM, [])) as empty:
        (best,) = empty.top_k(random_queries(1, 1, DIM), 3)
        assert best.first_tokens == []


def test_more_may_be_missing_than_one_look_into_the_directory_finds(client: Client) -> None:
    form = Format("float32", block_tokens=1, layers=1, kv_heads=1, head_dim=DIM)
    keys = [key(number) for number in range(BATCH_KEYS + 2)]
    with client.open(SPACE).bank(form, keys) as bank, pytest.raises(Missing) as missing:
        bank.attend(random_queries(1, 2, DIM))
    assert missing.value.ranges == [range(len(keys))]
