"""Contexts that lie on several nodes, by token, by KV head, by request: each token counts once,
wherever its block has gone meanwhile."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from tests.unit.client.conftest import address
from tests.unit.client.test_outgrown import wait_for

import kvfabric_client
from kvfabric.errors import Refused
from kvfabric.rpc.v1 import control_pb2
from kvfabric_client import Client, Missing, Query, Sequence, attend_batch
from kvfabric_client.blocks import shape_of

from .lending import FORM, QUERIES, SPACE, TOKENS, Nodes, at, give_back, right
from .numbers import Array, check, expected, fill, random_queries


def test_by_token(lent: Sequence, kv: Array, nodes: Nodes) -> None:
    for layer in range(2):
        tokens = right(lent, kv, layer)
        assert set(tokens) == set(nodes)
        assert sum(tokens.values()) == TOKENS
    right(lent, kv, positions=[3000, TOKENS - 1], window=1000, sinks=4)
    right(lent, kv, visible=2001)


def test_routes_are_remembered_and_followed_by_gaps(
    lent: Sequence, kv: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    right(lent, kv)
    home, asked = lent.writer.home, [0]
    describe = home.describe

    def counted(*given: Any, **options: Any) -> Any:
        asked[0] += 1
        return describe(*given, **options)

    monkeypatch.setattr(home, "describe", counted)
    for _ in range(5):
        right(lent, kv)
    assert asked[0] == 0
    before = len(at(lent, "home"))
    asked[0] = 0
    for start in range(TOKENS, TOKENS + 90):
        for layer in range(2):
            k, v = kv[layer, ..., start : start + 1, :]
            rows = random_queries(1, 4, 32, seed=start)
            got = lent.attend(rows, layer=layer, new=([start], k, v))
            check(got, expected(lent.shape, kv[..., : start + 1, :], layer, rows))
            assert sum(got.tokens.values()) == start
    assert asked[0] <= 12, before  # once for each time that something was lent, not for each call


def test_chunks_of_a_prompt_that_outgrows_its_home_meanwhile(client: Client, kv: Array) -> None:
    with client.open(SPACE).sequence(FORM) as sequence:
        fill(sequence, kv[..., :1900, :])
        for start in range(1900, 3100, 300):
            where = range(start, start + 300)
            rows = random_queries(300, 4, 32, seed=start)
            for layer in range(2):
                k, v = kv[layer, ..., start : start + 300, :]
                got = sequence.attend(rows, layer=layer, new=(where, k, v))
                known = kv[..., : start + 300, :]
                check(got, expected(sequence.shape, known, layer, rows, positions=where))
        assert len({place.node for place in sequence.blocks()}) > 1


def test_a_fork_and_a_cut_of_what_is_lent(lent: Sequence, kv: Array) -> None:
    right(lent, kv)
    cut = lent.blocks()[100].tokens.start + 7
    other = kv[..., ::-1, :].copy()
    with lent.fork(cut) as fork:
        mixed = np.concatenate([kv[..., :cut, :], other[..., :900, :]], axis=-2)
        fork.append(range(70000, 70900), other[..., :900, :])
        right(fork, mixed)
        right(lent, kv)
    lent.truncate(cut)
    lent.append(range(70000, 70900), other[..., :900, :])
    right(lent, mixed)
    right(lent, mixed, layer=1)


def test_by_kv_head_and_token(client: Client, nodes: Nodes, kv: Array) -> None:
    """One head at a home that has lent most of it, the other at another home."""
    room = client.open(SPACE)
    with (
        room.sequence(FORM, heads=1) as first,
        room.sequence(FORM, heads=1, first_head=1, at=address(nodes["west"], "tcp")) as second,
    ):
        assert (first.node, second.node) == ("home", "west")
        for head, sequence in enumerate((first, second)):
            fill(sequence, kv[..., head : head + 1, :TOKENS, :])
        whole = shape_of(FORM)
        new = ([TOKENS], kv[1, 0, :, TOKENS : TOKENS + 1], kv[1, 1, :, TOKENS : TOKENS + 1])
        (got,) = attend_batch([Query([second, first], QUERIES[:1], new=new)], layer=1)
        check(got, expected(whole, kv[..., : TOKENS + 1, :], 1, QUERIES[:1]))
        assert not isinstance(got, Missing)
        assert sum(got.tokens.values()) == 2 * TOKENS
        assert len({place.node for place in first.blocks()}) > 1
        with pytest.raises(Refused, match="follow each other"):
            attend_batch([Query([second, second], QUERIES)], layer=1)


def test_by_request(client: Client, nodes: Nodes, lent: Sequence, kv: Array) -> None:
    room = client.open(SPACE)
    with contextlib.ExitStack() as stack:
        others = [
            stack.enter_context(room.sequence(FORM, at=address(nodes[name], "unix")))
            for name in ("east", "west")
        ]
        for number, sequence in enumerate(others, 1):
            ids = range(100000 * number, 100000 * number + 500)
            sequence.append(ids, kv[..., number : 500 + number, :])
        asked = [Query(sequence, QUERIES) for sequence in (lent, *others)]
        answers = attend_batch(asked, layer=0)
        check(answers[0], expected(lent.shape, kv[..., :TOKENS, :], 0, QUERIES))
        for number, answer in enumerate(answers[1:], 1):
            known = kv[..., number : 500 + number, :]
            check(answer, expected(lent.shape, known, 0, QUERIES))


def test_a_creditor_is_drained_while_it_attends(client: Client, lent: Sequence, kv: Array) -> None:
    lent.truncate(3500)  # the others have room for so much
    assert right(lent, kv)["east"]
    client.manager().drain("east", client.deadline(60))
    wait_for(lambda: "east" not in right(lent, kv))
    assert not at(lent, "east")
    right(lent, kv, layer=1)


def test_blocks_that_were_copied_or_moved_by_hand(
    client: Client, lent: Sequence, kv: Array, nodes: Nodes
) -> None:
    right(lent, kv)
    request = control_pb2.MigrateRequest(source="east", destination="west", copy=True)
    client.manager().migrate(request, client.deadline(20))
    over = control_pb2.MOVE_STATE_DONE
    wait_for(lambda: all(move.state == over for move in client.manager().moves(client.deadline(5))))
    right(lent, kv)
    nodes["east"].stop()
    tokens = right(lent, kv)
    assert sum(tokens.values()) == TOKENS
    assert "east" not in tokens


def test_what_is_purged_is_missing_exactly_and_restored(
    client: Client, lent: Sequence, kv: Array, nodes: Nodes
) -> None:
    right(lent, kv)
    gone = [p for p in lent.blocks() if p.node == "west"][3:5]
    with kvfabric_client.connect(address(nodes["west"], "unix")) as vandal:
        vandal.open(SPACE).purge([p.key for p in gone if p.key])  # with all that continue them
    with pytest.raises(Missing) as missing:
        lent.attend(QUERIES, layer=0)
    lost = missing.value.ranges
    assert any(gone[0].tokens.start in tokens for tokens in lost)
    assert lost == lent.read_into(np.empty_like(kv[..., :TOKENS, :]))
    give_back(lent, kv, lost)
