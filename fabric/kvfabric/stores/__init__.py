"""Durable metadata: small values under string keys, each with a version.

The contract (`MetadataStore`), its in-memory twin, and the way to open a store by
its address. tests/unit/stores has the contract's tests; every implementation passes
them. KV bytes never come here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from kvfabric.errors import Conflict, Refused

MAX_KEY_BYTES = 512
MAX_VALUE_BYTES = 1024 * 1024
ABSENT = 0  # the version of a key that does not exist


class Versioned(NamedTuple):
    """A value and its version, which is greater than 0."""

    value: bytes
    version: int


class Entry(NamedTuple):
    """One element of a scan."""

    key: str
    value: bytes
    version: int


class MetadataStore(Protocol):
    """Key-value with versions, for use by any number of threads.

    Keys are text of 1 to MAX_KEY_BYTES bytes in UTF-8, values at most MAX_VALUE_BYTES;
    others are Refused. Every change gives the key a version greater than any it ever
    had, also after it was deleted and made anew, so that a version seen once never
    means another value. What a call has returned is durable if the store is. A store
    that is busy or away raises Retry; after `close` every call is Refused.
    """

    def get(self, key: str) -> Versioned | None:
        """The value, or None where there is none."""

    def put(self, key: str, value: bytes) -> int:
        """Set the value, whatever was there. Returns its version."""

    def compare_and_set(self, key: str, value: bytes, expected_version: int) -> int:
        """Set the value if the key's version is `expected_version`; ABSENT: if there is none.

        Returns the new version. Conflict where the version is another. A Retry leaves
        open whether it was done: look again.
        """

    def delete(self, key: str, expected_version: int | None = None) -> bool:
        """Remove the key; with a version, only that version (else Conflict).

        Returns whether there was something. Without a version safe to repeat.
        """

    def scan(self, prefix: str) -> Iterator[Entry]:
        """Every key that starts with `prefix` (may be empty), in order of UTF-8 bytes.

        Not a snapshot: a key that exists throughout is yielded exactly once, with a
        value it had meanwhile; one that comes or goes may be yielded or not.
        """

    def close(self) -> None:
        """Give everything back. May be repeated."""


class MemoryStore:
    """The contract in a dict: for tests, and for a fabric that need not outlive its process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, Versioned] = {}
        self._last_version = 0
        self._closed = False

    def get(self, key: str) -> Versioned | None:
        check_key(key)
        with self._lock:
            self._check_open()
            return self._entries.get(key)

    def put(self, key: str, value: bytes) -> int:
        check_key(key)
        check_value(key, value)
        with self._lock:
            self._check_open()
            return self._set(key, value)

    def compare_and_set(self, key: str, value: bytes, expected_version: int) -> int:
        check_key(key)
        check_value(key, value)
        with self._lock:
            self._check_open()
            self._check_version(key, expected_version)
            return self._set(key, value)

    def delete(self, key: str, expected_version: int | None = None) -> bool:
        check_key(key)
        with self._lock:
            self._check_open()
            if expected_version is not None:
                self._check_version(key, expected_version)
            return self._entries.pop(key, None) is not None

    def scan(self, prefix: str) -> Iterator[Entry]:
        check_prefix(prefix)
        with self._lock:
            self._check_open()
            found = [
                Entry(key, *versioned)
                for key, versioned in self._entries.items()
                if key.startswith(prefix)
            ]
        found.sort(key=lambda entry: entry.key.encode())
        return iter(found)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._entries.clear()

    def _set(self, key: str, value: bytes) -> int:
        self._last_version += 1
        self._entries[key] = Versioned(bytes(value), self._last_version)
        return self._last_version

    def _check_version(self, key: str, expected: int) -> None:
        entry = self._entries.get(key)
        check_version(key, entry.version if entry else ABSENT, expected)

    def _check_open(self) -> None:
        if self._closed:
            raise Refused("this store is closed; open another one")


def open_store(address: str) -> MetadataStore:
    """The store at an address: "memory:", "sqlite:PATH" or "redis://HOST:PORT/DB".

    rediss:// (TLS) and unix:// are Redis too. Refused for any other.
    """
    kind, _, path = address.partition(":")
    if kind == "memory" and not path:
        return MemoryStore()
    if kind == "sqlite" and path:
        from kvfabric.stores.sqlite import SqliteStore

        return SqliteStore(path)
    if kind in ("redis", "rediss", "unix") and path.startswith("//"):
        try:
            from kvfabric.stores.redis import RedisStore
        except ImportError as error:
            raise Refused(
                f"{address!r} needs the redis package: pip install 'kvfabric[redis]'"
            ) from error
        return RedisStore(address)
    raise Refused(f"{address!r} is not a store; take memory:, sqlite:PATH or redis://HOST:PORT/DB")


def check_key(key: str) -> None:
    """Refused unless `key` may be a key."""
    try:
        size_bytes = len(key.encode())
    except UnicodeEncodeError as error:
        raise Refused(f"the key {key!r} is not text that UTF-8 can hold") from error
    if not 1 <= size_bytes <= MAX_KEY_BYTES or "\0" in key:
        raise Refused(
            f"a key is 1 to {MAX_KEY_BYTES} bytes of text without NUL, not {key[:40]!r} "
            f"({size_bytes} bytes)"
        )


def check_prefix(prefix: str) -> None:
    """Refused unless a key may start like this. Every key starts with ""."""
    if prefix:
        check_key(prefix)


def check_value(key: str, value: bytes) -> None:
    """Refused unless `value` may be stored."""
    if len(value) > MAX_VALUE_BYTES:
        raise Refused(
            f"the value of {key!r} has {len(value)} bytes; metadata is at most "
            f"{MAX_VALUE_BYTES}, keep payloads in shards"
        )


def check_version(key: str, found: int, expected: int) -> None:
    """Conflict unless they are equal."""
    if found != expected:
        raise Conflict(f"{key!r} has version {found}, not {expected}; read it again")
