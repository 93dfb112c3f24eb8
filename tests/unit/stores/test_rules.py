"""Operators' rules in the stores that outlive their process: back whole, and by one manager."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.redis_server import RedisServer

from kvfabric.manager.epoch import Fenced, FencedStore, next_epoch
from kvfabric.manager.rules_store import RulesStore
from kvfabric.moves.policies import Drain, Policy, Rules
from kvfabric.stores import open_store
from kvfabric.types import Key, NamespaceId, NodeId

ROOM, NODE = NamespaceId(b"r" * 32), NodeId("b")
KEYS = [Key(number.to_bytes(32)) for number in range(300)]


@pytest.fixture(params=["sqlite", "redis"])
def address(request: pytest.FixtureRequest, tmp_path: Path, redis_server: RedisServer) -> str:
    redis_server.clear()
    return f"sqlite:{tmp_path / 'm.db'}" if request.param == "sqlite" else redis_server.address


def test_rules_outlive_their_store_s_closing(address: str) -> None:
    first = open_store(address)
    kept = RulesStore(first)
    kept.pin(ROOM, KEYS)
    kept.unpin(ROOM, KEYS[:1])
    kept.set_replicas(ROOM, KEYS[:4], 3)
    kept.set_replicas(ROOM, KEYS[:2], 0)
    kept.set_replicas(ROOM, KEYS[3:4], 1)
    kept.set_policy(None, Policy(2))
    kept.drain(NODE, Drain(7))
    first.close()

    second = open_store(address)
    rules = Rules()
    RulesStore(second).load(rules)
    second.close()

    assert list(rules.pins) == [(ROOM, key, True) for key in KEYS[1:]]
    assert list(rules.counts) == [(ROOM, KEYS[2], 3), (ROOM, KEYS[3], 1)]
    assert (rules.replicas(ROOM), rules.drains) == (2, {NODE: Drain(7)})
    rules.check()


def test_a_manager_that_was_followed_changes_no_rule(address: str) -> None:
    store = open_store(address)
    old = RulesStore(FencedStore(store, next_epoch(store)))
    old.set_replicas(ROOM, KEYS[:1], 2)

    new = FencedStore(store, next_epoch(store))

    for replicas in (3, 0):
        with pytest.raises(Fenced):
            old.set_replicas(ROOM, KEYS[:1], replicas)
    rules = Rules()
    RulesStore(new).load(rules)
    store.close()
    assert list(rules.counts) == [(ROOM, KEYS[0], 2)]
