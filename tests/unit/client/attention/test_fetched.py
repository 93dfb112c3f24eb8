"""Nodes that compute no attention: what they have comes here and is attended here, and the result
is right; nobody else is asked for it."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Several

import numpy as np
import pytest
from tests.unit.client.conftest import Start, address, key

import kvfabric_client
from kvfabric.errors import Refused
from kvfabric.types import Format
from kvfabric_client import Client, Missing, Pages, Sequence
from kvfabric_client.attention import fetched
from kvfabric_client.attention.fetched import HERE, Fetched
from kvfabric_client.attention.route import Block
from kvfabric_client.attention.runs import count
from kvfabric_client.attention.spans import Span
from kvfabric_client.blocks import shape_of
from kvfabric_client.deadline import Deadline

from .lending import QUERIES, SPACE, TOKENS, Nodes, at, give_back, right
from .numbers import Array, check, expected, fill, random_kv, random_queries
from .test_sparse import QUERY, best_pages

ALL = ("east", "home", "west")
SELDOM = pytest.mark.exhaustive
SOME = pytest.mark.parametrize(
    "mute", [("east",), pytest.param(("home",), marks=SELDOM), ALL], ids="+".join
)


@SOME
def test_the_result_is_right_and_says_what_was_attended_here(
    lent: Sequence, kv: Array, mute: tuple[str, ...]
) -> None:
    places = [at(lent, name) for name in mute]
    for layer in range(2):
        tokens = right(lent, kv, layer)
        if places == [
            at(lent, name) for name in mute
        ]:  # else some moved since they were looked for
            assert tokens[HERE] == sum(len(run) for runs in places for run in runs)
        assert set(tokens) == {HERE, *ALL} - set(mute)
        assert sum(tokens.values()) == TOKENS
    right(lent, kv, positions=[3000, TOKENS - 1], window=1000, sinks=4)
    right(lent, kv, visible=2001, softcap=3.0)
    only = [range(5, 6), range(100, 2000), range(TOKENS - 3, TOKENS)]
    got = lent.attend(QUERIES, layer=0, tokens=only)
    check(got, expected(lent.shape, kv[..., :TOKENS, :], 0, QUERIES, only=only))


@SOME
def test_tokens_that_come_meanwhile(lent: Sequence, kv: Array, mute: tuple[str, ...]) -> None:
    for start in range(TOKENS, TOKENS + 20):
        for layer in range(2):
            rows = random_queries(1, 4, 32, seed=start)
            new = ([start], *kv[layer, ..., start : start + 1, :])
            got = lent.attend(rows, layer=layer, new=new)
            check(got, expected(lent.shape, kv[..., : start + 1, :], layer, rows))
            assert sum(got.tokens.values()) == start


@SELDOM
@pytest.mark.parametrize("mute", [ALL])
def test_many_rows_share_what_was_fetched(lent: Sequence, kv: Array) -> None:
    rows = random_queries(2500, 4, 32)
    got = lent.attend(rows, layer=1)
    check(got, expected(lent.shape, kv[..., :TOKENS, :], 1, rows))
    assert got.traffic.fetched_bytes == lent.attend(rows[:1], layer=1).traffic.fetched_bytes


@pytest.mark.parametrize("mute", [ALL])
def test_a_few_blocks_are_here_at_a_time(
    lent: Sequence, kv: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    within = Fetched.within

    def noted(some: Fetched, runs: list[tuple[int, int]]) -> Fetched:
        sizes.append(count(some.runs))
        return within(some, runs)

    monkeypatch.setattr(Fetched, "within", noted)
    monkeypatch.setattr(fetched, "CHUNK_BYTES", 3 * 16 * 4 * 2 * 2 * 32)
    right(lent, kv)
    assert max(sizes) == 3 * 16


@pytest.mark.parametrize("mute", [("east",)])
def test_a_node_is_asked_once_whether_it_computes(
    lent: Sequence, kv: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    right(lent, kv)
    asked: list[str] = []
    call = Span._call

    def noted(span: Span, blocks: Several[Block], deadline: Deadline) -> None:
        asked.append(span.link.node)
        call(span, blocks, deadline)

    monkeypatch.setattr(Span, "_call", noted)
    lent.context.close()
    assert right(lent, kv, layer=1)[HERE]
    assert set(asked) == {"home", "west"}


@pytest.mark.parametrize("mute", [("east", "west")])
def test_blocks_of_a_node_that_has_died_are_missing_exactly(
    lent: Sequence, kv: Array, nodes: Nodes
) -> None:
    lent.truncate(1500)  # so that what is left has room for it
    right(lent, kv)
    holder = lent.blocks()[10].node
    assert holder != "home"
    theirs = at(lent, holder)
    nodes[holder].stop()
    with pytest.raises(Missing) as missing:
        lent.attend(QUERIES, layer=0)
    assert missing.value.ranges == theirs
    give_back(lent, kv, theirs)


@pytest.mark.parametrize("mute", [pytest.param(("east",), marks=SELDOM), ALL], ids="+".join)
def test_the_best_of_it_are_found_here(lent: Sequence, kv: Array, mute: tuple[str, ...]) -> None:
    (best,) = lent.top_k(QUERY, 30, layer=1)
    keys = np.repeat(kv[1, 0, :, :TOKENS], 2, axis=0)
    scores = np.einsum("hd,htd->ht", QUERY[0], keys).max(axis=0)
    assert best.first_tokens == np.argsort(-scores, kind="stable")[:30].tolist()
    got = lent.attend(QUERY, layer=1, pages=Pages(20, 8))
    chosen = [
        range(p, p + 8) for p in best_pages(kv[..., :TOKENS, :], 1, QUERY, 8, lent.sealed, 20)
    ]
    only = [*chosen, range(lent.sealed, TOKENS)]
    check(got, expected(lent.shape, kv[..., :TOKENS, :], 1, QUERY, only=only))


@pytest.fixture(params=["unix", "tcp"])
def alone(request: pytest.FixtureRequest, start: Start) -> Iterator[Client]:
    """Of one node, which computes nothing."""
    node = start(attention_threads=0)
    with kvfabric_client.connect(address(node, request.param), timeout_s=20) as client:
        yield client


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["kv", "mla"])
def test_every_dtype_and_kind(alone: Client, dtype: str, kind: str) -> None:
    latent = kind == "mla"
    form = Format(
        dtype, block_tokens=16, layers=3, kv_heads=1 if latent else 2, head_dim=32, kind=kind
    )
    kv = random_kv(shape_of(form), 70)
    queries = random_queries(3, 4, 32, dtype)
    with alone.open(SPACE).sequence(form) as sequence:
        fill(sequence, kv[..., :50, :])
        sequence.seal()  # a short block
        fill(sequence, kv)
        value_dim = 24 if latent else 0
        got = sequence.attend(queries, layer=2, value_dim=value_dim)
        wanted = expected(sequence.shape, kv, 2, queries, dtype=dtype, value_dim=value_dim)
        check(got, wanted)
        assert got.tokens == {HERE: 70}


def test_a_bank_is_searched_and_summed_here(alone: Client) -> None:
    form = Format("float32", block_tokens=64, layers=1, head_dim=16, kind="mla")
    numbers = np.random.default_rng(3).normal(size=(640, 16)).astype(np.float32)
    keys = [key(number) for number in range(1, 11)]
    room = alone.open(SPACE)
    room.put(keys, list(numbers.reshape(10, -1)))
    with room.bank(form, keys) as bank:
        query = random_queries(1, 1, 16)
        (best,) = bank.top_k(query, 7, values=True)
        scores = numbers @ query[0, 0]
        assert best.first_tokens == np.argsort(-scores, kind="stable")[:7].tolist()
        which, weights = [5, 600, 5, 64], [1.0, 2.0, 0.5, -1.0]
        wanted = np.einsum("t,td->d", weights, numbers[which])
        assert np.abs(bank.reduce(which, weights)[0] - wanted).max() < 1e-5
        with pytest.raises(Refused, match="layer 1 of 1"):
            bank.reduce(which, weights, layer=1)
        room.purge([keys[3]])
        with pytest.raises(Missing) as missing:
            bank.top_k(query, 7)
        assert missing.value.ranges[0].start == 192
