"""The manager's epoch: counts the starts on one store, so that a newer start fences older ones."""

from __future__ import annotations

from collections.abc import Iterator

from kvfabric.errors import Broken, Conflict
from kvfabric.stores import ABSENT, Entry, MetadataStore, Versioned

EPOCH_KEY = "manager/epoch"
MAX_TRIES = 16


class Fenced(Conflict):
    """Another manager was started on this manager's store: this one must end."""


def next_epoch(store: MetadataStore) -> int:
    """An epoch greater than any that this store ever gave; durable before it returns."""
    for _ in range(MAX_TRIES):
        entry = store.get(EPOCH_KEY)
        epoch = _parse(entry.value) + 1 if entry else 1
        try:
            store.compare_and_set(
                EPOCH_KEY, str(epoch).encode(), entry.version if entry else ABSENT
            )
        except Conflict:
            continue  # another manager starts at this moment
        return epoch
    raise Conflict(
        f"{MAX_TRIES} other managers took an epoch at the same time; run one manager per store"
    )


def outrank(store: MetadataStore, own: int, seen: int) -> int:
    """An epoch above `seen`, which a node has heard of although the store knows of none above
    `own`: the store has lost what it knew. Fenced where the store does know of a newer one.
    """
    assert_newest(store, own)
    entry = store.get(EPOCH_KEY)
    try:
        store.compare_and_set(EPOCH_KEY, str(seen + 1).encode(), entry.version if entry else ABSENT)
    except Conflict:
        assert_newest(store, own)
        raise
    return seen + 1


def assert_newest(store: MetadataStore, own: int) -> None:
    """Fenced if a manager with a greater epoch was started on this store."""
    entry = store.get(EPOCH_KEY)
    newest = _parse(entry.value) if entry else 0
    if newest > own:
        raise Fenced(
            f"a manager with epoch {newest} was started on this store, this one has {own}; it "
            "ends, so that one decides"
        )


class FencedStore:
    """A MetadataStore for one manager: what a newer manager has taken over it cannot change."""

    def __init__(self, store: MetadataStore, epoch: int) -> None:
        self.epoch = epoch
        self._store = store

    def get(self, key: str) -> Versioned | None:
        return self._store.get(key)

    def put(self, key: str, value: bytes) -> int:
        assert_newest(self._store, self.epoch)
        return self._store.put(key, value)

    def compare_and_set(self, key: str, value: bytes, expected_version: int) -> int:
        assert_newest(self._store, self.epoch)
        return self._store.compare_and_set(key, value, expected_version)

    def delete(self, key: str, expected_version: int | None = None) -> bool:
        assert_newest(self._store, self.epoch)
        return self._store.delete(key, expected_version)

    def scan(self, prefix: str) -> Iterator[Entry]:
        return self._store.scan(prefix)

    def close(self) -> None:
        self._store.close()


def _parse(value: bytes) -> int:
    if not value.isdigit():
        raise Broken(f"the store's {EPOCH_KEY} is {value[:40]!r}, not a number; restore the store")
    return int(value)
