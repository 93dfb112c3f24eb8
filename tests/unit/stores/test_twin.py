"""Every store does what its in-memory twin does, whatever the order of calls."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from tests.redis_server import RedisServer

from kvfabric.errors import FabricError
from kvfabric.stores import Entry, MemoryStore, MetadataStore
from kvfabric.stores.redis import RedisStore
from kvfabric.stores.sqlite import SqliteStore

KEYS = st.sampled_from(["a", "a/1", "a/2", "b", "é"])
VALUES = st.binary(max_size=3)


class Twins(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.twin: MetadataStore = MemoryStore()
        self.store: MetadataStore = self.open()

    def open(self) -> MetadataStore:
        return SqliteStore(Path(self.folder.name) / "store.db")

    def both(self, call: Callable[[MetadataStore], object]) -> None:
        answers = []
        for store in (self.twin, self.store):
            try:
                answers.append(repr(call(store)))
            except FabricError as error:
                answers.append(repr(error))
        assert answers[0] == answers[1]

    @rule(key=KEYS, value=VALUES)
    def put(self, key: str, value: bytes) -> None:
        self.both(lambda store: store.put(key, value))

    @rule(key=KEYS, value=VALUES, back=st.integers(0, 2))
    def compare_and_set(self, key: str, value: bytes, back: int) -> None:
        entry = self.twin.get(key)
        version = max(0, (entry.version if entry else 0) - back)
        self.both(lambda store: store.compare_and_set(key, value, version))

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.both(lambda store: store.delete(key))

    @rule(key=KEYS, version=st.integers(0, 9))
    def delete_version(self, key: str, version: int) -> None:
        self.both(lambda store: store.delete(key, version))

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.open()

    @invariant()
    def same_content(self) -> None:
        everything: list[Entry] = list(self.twin.scan(""))
        assert list(self.store.scan("")) == everything
        assert list(self.store.scan("a/")) == [e for e in everything if e.key.startswith("a/")]

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


SOME = settings(max_examples=25, stateful_step_count=20, deadline=None)
Twins.TestCase.settings = SOME
TestTwins = Twins.TestCase


def test_redis_is_a_twin_too(redis_server: RedisServer) -> None:
    class RedisTwins(Twins):
        def __init__(self) -> None:
            redis_server.clear()
            super().__init__()

        def open(self) -> MetadataStore:
            return RedisStore(redis_server.address)

    run_state_machine_as_test(RedisTwins, settings=SOME)
