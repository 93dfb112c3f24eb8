"""Of two managers on one store the newer decides; a store that forgot does not turn time back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvfabric.manager.epoch import Fenced, FencedStore, assert_newest, next_epoch, outrank
from kvfabric.stores import MemoryStore


def test_an_old_manager_changes_nothing_once_a_newer_was_started() -> None:
    store = MemoryStore()
    old = FencedStore(store, next_epoch(store))
    version = old.put("policy", b"mine")

    new = FencedStore(store, next_epoch(store))

    changes: list[Callable[[], object]] = [
        lambda: old.put("policy", b"late"),
        lambda: old.compare_and_set("policy", b"late", version),
        lambda: old.delete("policy"),
    ]
    for change in changes:
        with pytest.raises(Fenced, match="epoch 2 was started"):
            change()
    assert new.get("policy") == (b"mine", version)
    assert new.compare_and_set("policy", b"newer", version) > version
    assert [entry.key for entry in old.scan("policy")] == ["policy"]


def test_a_store_that_forgot_gives_an_epoch_above_what_nodes_have_seen() -> None:
    store = MemoryStore()
    own = next_epoch(store)

    assert outrank(store, own, seen=7) == 8
    assert next_epoch(store) == 9


def test_a_fenced_manager_does_not_outrank_the_newer_one() -> None:
    store = MemoryStore()
    old = next_epoch(store)
    new = next_epoch(store)

    with pytest.raises(Fenced):
        outrank(store, old, seen=new)

    assert_newest(store, new)
