"""The MetadataStore in Redis: for a cluster whose control plane may move between machines.

Every change is one Lua script, so that versions and order hold with any number of
writers. It is as durable as Redis was told to be: appendfsync always keeps what a call
has returned over a loss of power, everysec may lose the last second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry as RedisRetry

from kvfabric import logs
from kvfabric.errors import Broken, Denied, FabricError, Refused, Retry
from kvfabric.stores import (
    ABSENT,
    Entry,
    Versioned,
    check_key,
    check_prefix,
    check_value,
    check_version,
)

SCHEMA_VERSION = b"1"
TIMEOUT_S = 2.0
SCAN_PAGE = 256
# In braces: a Redis cluster keeps all of it on one of its nodes.
PREFIX = "{kvfabric}"
_AFTER_UTF8 = b"\xff"  # greater than any byte of a key

# KEYS: entries, names, last. `entries` is a hash of "version:value", `names` a sorted set
# of its fields in the order of their bytes, `last` the last version given to anything.
_SET = """
local version = redis.call('INCR', KEYS[3])
redis.call('HSET', KEYS[1], ARGV[1], version .. ':' .. ARGV[2])
redis.call('ZADD', KEYS[2], 0, ARGV[1])
return {1, version}
"""
_FOUND = """
local entry = redis.call('HGET', KEYS[1], ARGV[1])
local found = 0
if entry then found = tonumber(string.sub(entry, 1, string.find(entry, ':', 1, true) - 1)) end
"""
_COMPARE_AND_SET = f"{_FOUND} if found ~= tonumber(ARGV[3]) then return {{0, found}} end {_SET}"
_DELETE = f"""{_FOUND}
if ARGV[2] ~= '' and found ~= tonumber(ARGV[2]) then return {{0, found}} end
redis.call('ZREM', KEYS[2], ARGV[1])
return {{1, redis.call('HDEL', KEYS[1], ARGV[1])}}
"""
_PAGE = """
local names = redis.call('ZRANGE', KEYS[2], ARGV[1], ARGV[2], 'BYLEX', 'LIMIT', 0, ARGV[3])
local page = {}
for _, name in ipairs(names) do
  page[#page + 1] = name
  page[#page + 1] = redis.call('HGET', KEYS[1], name)
end
return page
"""

log = logs.logger(part="store")


class RedisStore:
    """See MetadataStore. `address` is redis://[:PASSWORD@]HOST:PORT[/DB], rediss:// or unix://."""

    def __init__(self, address: str) -> None:
        """Retry where no Redis answers, Refused where it holds something else."""
        self._where = f"the store at {_without_password(address)}"
        self._keys = [f"{PREFIX}:{name}" for name in ("entries", "names", "last")]
        self._closed = False
        try:
            # Without a retry of its own: only the caller knows what may be done twice.
            self._redis: Any = redis.Redis.from_url(
                address,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=RedisRetry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise Refused(f"{self._where}: {error}") from error
        self._set, self._compare_and_set, self._delete, self._page = (
            self._redis.register_script(script)
            for script in (_SET, _COMPARE_AND_SET, _DELETE, _PAGE)
        )
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def get(self, key: str) -> Versioned | None:
        check_key(key)
        with self._translated():
            raw = self._redis.hget(self._keys[0], key.encode())
        return None if raw is None else _versioned(raw)

    def put(self, key: str, value: bytes) -> int:
        check_key(key)
        check_value(key, value)
        with self._translated():
            _, version = self._set(self._keys, [key.encode(), value])
        return int(version)

    def compare_and_set(self, key: str, value: bytes, expected_version: int) -> int:
        check_key(key)
        check_value(key, value)
        with self._translated():
            done, version = self._compare_and_set(
                self._keys, [key.encode(), value, expected_version]
            )
        if not done:
            check_version(key, int(version), expected_version)
        return int(version)

    def delete(self, key: str, expected_version: int | None = None) -> bool:
        check_key(key)
        expected = b"" if expected_version is None else expected_version
        with self._translated():
            done, found = self._delete(self._keys, [key.encode(), expected])
        if not done:
            check_version(key, int(found), ABSENT if expected_version is None else expected_version)
        return bool(found)

    def scan(self, prefix: str) -> Iterator[Entry]:
        check_prefix(prefix)
        end = b"(" + prefix.encode() + _AFTER_UTF8
        page = self._entries(b"[" + prefix.encode(), end)  # now: a closed store says so at once
        return self._pages(page, end)

    def close(self) -> None:
        self._closed = True
        self._redis.close()

    def _pages(self, page: list[Entry], end: bytes) -> Iterator[Entry]:
        while page:
            yield from page
            if len(page) < SCAN_PAGE:
                return
            page = self._entries(b"(" + page[-1].key.encode(), end)

    def _entries(self, start: bytes, end: bytes) -> list[Entry]:
        with self._translated():
            raw = self._page(self._keys, [start, end, SCAN_PAGE])
        return [
            Entry(name.decode(), *_versioned(cell))
            for name, cell in zip(raw[::2], raw[1::2], strict=True)
        ]

    def _prepare(self) -> None:
        with self._translated():
            schema = f"{PREFIX}:schema"
            self._redis.set(schema, SCHEMA_VERSION, nx=True)
            found = self._redis.get(schema)
            persistence = self._redis.info("persistence")
        if found != SCHEMA_VERSION:
            raise Refused(
                f"{self._where} has schema {found!r}, this kvfabric knows "
                f"{SCHEMA_VERSION.decode()}; run the newer kvfabric that wrote it"
            )
        if not persistence.get("aof_enabled"):
            log.warning(
                "redis keeps no log of its changes",
                effect="a Redis that is killed forgets policies and pins",
                remedy="set appendonly yes, and appendfsync always where power may fail",
            )

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        if self._closed:
            raise Refused(f"{self._where} is closed; open it again")
        try:
            yield
        except redis.RedisError as error:
            raise self._translate(error) from error

    def _translate(self, error: redis.RedisError) -> FabricError:
        if isinstance(error, redis.AuthenticationError | redis.exceptions.NoPermissionError):
            return Denied(f"{self._where} does not let us in: {error}; mind the address's password")
        if isinstance(error, redis.ConnectionError | redis.TimeoutError):
            return Retry(f"{self._where} does not answer: {error}")
        if isinstance(error, redis.ReadOnlyError | redis.exceptions.OutOfMemoryError):
            return Retry(f"{self._where} takes no writes now: {error}")
        return Broken(f"{self._where} failed: {error}; is something else using its keys?")


def _versioned(raw: bytes) -> Versioned:
    version, _, value = raw.partition(b":")
    return Versioned(value, int(version))


def _without_password(address: str) -> str:
    scheme, separator, rest = address.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
