"""What nodes of one fabric show each other: a secret that is made once per store."""

from __future__ import annotations

import contextlib
import secrets

from kvfabric.errors import Broken, Conflict
from kvfabric.stores import ABSENT, MetadataStore

TOKEN_KEY = "cluster/peer-token"
TOKEN_BYTES = 32


def peer_token(store: MetadataStore) -> bytes:
    """The fabric's token: the store's, or a new one that is durable before it returns."""
    entry = store.get(TOKEN_KEY)
    if entry is None:
        with contextlib.suppress(Conflict):  # another manager makes one at this moment
            store.compare_and_set(TOKEN_KEY, secrets.token_bytes(TOKEN_BYTES), ABSENT)
        entry = store.get(TOKEN_KEY)
    if entry is None or len(entry.value) != TOKEN_BYTES:
        raise Broken(f"the store's {TOKEN_KEY} is not {TOKEN_BYTES} bytes; restore the store")
    return entry.value
