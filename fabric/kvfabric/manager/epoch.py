"""The manager's epoch: counts the starts on one store, so that a newer start fences older ones."""

from __future__ import annotations

from kvfabric.errors import Broken, Conflict
from kvfabric.stores import ABSENT, MetadataStore

EPOCH_KEY = "manager/epoch"
MAX_TRIES = 16


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


def _parse(value: bytes) -> int:
    if not value.isdigit():
        raise Broken(f"the store's {EPOCH_KEY} is {value[:40]!r}, not a number; restore the store")
    return int(value)
