"""The MetadataStore contract, run over every implementation."""

from __future__ import annotations

import abc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.redis_server import RedisServer

from kvfabric.errors import Conflict, Refused
from kvfabric.stores import (
    ABSENT,
    MAX_KEY_BYTES,
    MAX_VALUE_BYTES,
    Entry,
    MemoryStore,
    MetadataStore,
    open_store,
)
from kvfabric.stores.redis import RedisStore
from kvfabric.stores.sqlite import SCAN_PAGE, SqliteStore


class StoreContract(abc.ABC):
    """Subclass it and give `make_store`: all of these must pass."""

    @abc.abstractmethod
    def make_store(self, folder: Path) -> MetadataStore: ...

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[MetadataStore]:
        store = self.make_store(tmp_path)
        yield store
        store.close()

    def test_what_was_put_is_got_with_its_version(self, store: MetadataStore) -> None:
        version = store.put("epoch", b"\x00\xff")

        assert store.get("epoch") == (b"\x00\xff", version)
        assert version > ABSENT

    def test_a_key_that_was_never_put_is_absent(self, store: MetadataStore) -> None:
        assert store.get("epoch") is None
        assert store.delete("epoch") is False

    def test_an_empty_value_is_a_value(self, store: MetadataStore) -> None:
        version = store.put("flag", b"")

        assert store.get("flag") == (b"", version)

    def test_every_change_gives_a_greater_version_also_after_a_deletion(
        self, store: MetadataStore
    ) -> None:
        first = store.put("key", b"same")
        second = store.put("key", b"same")
        store.delete("key")
        third = store.compare_and_set("key", b"same", ABSENT)

        assert first < second < third

    def test_compare_and_set_makes_a_key_only_where_there_is_none(
        self, store: MetadataStore
    ) -> None:
        version = store.compare_and_set("epoch", b"1", ABSENT)

        with pytest.raises(Conflict, match=f"'epoch' has version {version}, not 0"):
            store.compare_and_set("epoch", b"2", ABSENT)
        assert store.get("epoch") == (b"1", version)

    def test_compare_and_set_on_an_old_version_changes_nothing(self, store: MetadataStore) -> None:
        old = store.put("epoch", b"1")
        new = store.compare_and_set("epoch", b"2", old)

        with pytest.raises(Conflict):
            store.compare_and_set("epoch", b"3", old)
        assert store.get("epoch") == (b"2", new)

    def test_compare_and_set_on_a_deleted_key_is_a_conflict(self, store: MetadataStore) -> None:
        version = store.put("epoch", b"1")
        store.delete("epoch")

        with pytest.raises(Conflict, match="has version 0"):
            store.compare_and_set("epoch", b"2", version)
        assert store.get("epoch") is None

    def test_deletion_by_version_spares_another_version(self, store: MetadataStore) -> None:
        old = store.put("key", b"1")
        new = store.put("key", b"2")

        with pytest.raises(Conflict):
            store.delete("key", old)
        assert store.delete("key", new) is True
        assert store.get("key") is None

    def test_a_scan_gives_a_prefix_in_order_of_utf8_bytes(self, store: MetadataStore) -> None:
        # U+10000 sorts after U+FFFD in UTF-8 and before it in UTF-16.
        keys = ["a/2", "a/10", "a/é", "a/\U00010000", "a/\ufffd", "a", "b/1", "a0"]
        versions = {key: store.put(key, key.encode()) for key in keys}

        found = list(store.scan("a/"))

        assert found == [
            Entry(key, key.encode(), versions[key])
            for key in ["a/10", "a/2", "a/é", "a/\ufffd", "a/\U00010000"]
        ]
        assert [entry.key for entry in store.scan("")] == sorted(keys, key=str.encode)
        assert list(store.scan("c")) == []

    def test_a_scan_goes_on_over_its_pages_while_keys_come_and_go(
        self, store: MetadataStore
    ) -> None:
        keys = [f"k{number:05}" for number in range(2 * SCAN_PAGE + 1)]
        for key in keys:
            store.put(key, b"")

        scan = store.scan("k")
        seen = [next(scan).key]
        store.delete(keys[-1])
        store.put("k00000a", b"")
        seen += [entry.key for entry in scan]

        assert [key for key in seen if key not in ("k00000a", keys[-1])] == keys[:-1]

    @pytest.mark.parametrize(
        "key", ["", "x" * (MAX_KEY_BYTES + 1), "é" * MAX_KEY_BYTES, "\0", "\ud800"]
    )
    def test_a_key_that_cannot_be_one_is_refused(self, store: MetadataStore, key: str) -> None:
        with pytest.raises(Refused, match="key"):
            store.put(key, b"")
        with pytest.raises(Refused, match="key"):
            store.get(key)

    def test_the_longest_key_and_the_largest_value_fit(self, store: MetadataStore) -> None:
        key, value = "x" * MAX_KEY_BYTES, bytes(MAX_VALUE_BYTES)

        version = store.put(key, value)

        assert store.get(key) == (value, version)

    def test_a_value_over_the_limit_is_refused_and_changes_nothing(
        self, store: MetadataStore
    ) -> None:
        version = store.put("key", b"old")

        with pytest.raises(Refused, match="keep payloads in shards"):
            store.put("key", bytes(MAX_VALUE_BYTES + 1))
        assert store.get("key") == (b"old", version)

    def test_a_closed_store_refuses_every_call_and_may_be_closed_again(
        self, store: MetadataStore
    ) -> None:
        store.close()
        store.close()

        for call in (
            lambda: store.get("key"),
            lambda: store.put("key", b""),
            lambda: store.compare_and_set("key", b"", ABSENT),
            lambda: store.delete("key"),
            lambda: store.scan(""),
        ):
            with pytest.raises(Refused, match="closed"):
                call()

    def test_of_many_threads_exactly_one_wins_each_version(self, store: MetadataStore) -> None:
        wins: list[int] = []

        def raise_it() -> None:
            done = 0
            while done < 20:
                entry = store.get("counter")
                value, version = (int(entry.value), entry.version) if entry else (0, ABSENT)
                try:
                    store.compare_and_set("counter", str(value + 1).encode(), version)
                except Conflict:
                    continue
                done += 1
                wins.append(value)

        threads = [threading.Thread(target=raise_it) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)

        assert sorted(wins) == list(range(80))


class TestMemoryStore(StoreContract):
    def make_store(self, folder: Path) -> MetadataStore:
        return MemoryStore()


class TestSqliteStore(StoreContract):
    def make_store(self, folder: Path) -> MetadataStore:
        return SqliteStore(folder / "store.db")


class TestRedisStore(StoreContract):
    @pytest.fixture(autouse=True)
    def _server(self, redis_server: RedisServer) -> None:
        redis_server.clear()
        self.address = redis_server.address

    def make_store(self, folder: Path) -> MetadataStore:
        return RedisStore(self.address)


def test_a_store_is_opened_by_its_address(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    first = open_store(f"sqlite:{path}")
    version = first.put("key", b"value")
    first.close()

    again = open_store(f"sqlite:{path}")

    assert again.get("key") == (b"value", version)
    again.close()
    memory = open_store("memory:")
    assert memory.get("key") is None


@pytest.mark.parametrize("address", ["", "sqlite", "sqlite:", "memory:x", "redis:", "etcd:host"])
def test_an_unknown_address_is_refused_with_those_that_exist(address: str) -> None:
    with pytest.raises(Refused, match="take memory:, sqlite:PATH or redis"):
        open_store(address)
