"""The MetadataStore in one SQLite file: the embedded default, nothing to install.

Write-ahead log with synchronous=FULL: what a call has returned survives kill -9 and
loss of power. Several processes may open the same file.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from kvfabric.errors import Broken, FabricError, Refused, Retry
from kvfabric.stores import (
    ABSENT,
    Entry,
    Versioned,
    check_key,
    check_prefix,
    check_value,
    check_version,
)

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 5.0
SCAN_PAGE = 256
_APPLICATION_ID = 0x6B766661  # "kvfa", in the header of every store's file

# Keys are blobs, so that their order is that of UTF-8 bytes. `versions` has one row:
# the last version given to anything, which deletions do not take back.
_SCHEMA = (
    "CREATE TABLE entries ("
    "key BLOB PRIMARY KEY, value BLOB NOT NULL, version INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE versions (last INTEGER NOT NULL)",
    "INSERT INTO versions VALUES (0)",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
_SET = (
    "INSERT INTO entries VALUES (?, ?, ?) "
    "ON CONFLICT (key) DO UPDATE SET value = excluded.value, version = excluded.version"
)
_PAGE = "SELECT key, value, version FROM entries WHERE key >= ? AND key < ? ORDER BY key LIMIT ?"
_AFTER_UTF8 = b"\xff"  # greater than any byte of a key


class SqliteStore:
    """See MetadataStore. One connection, used by one thread at a time."""

    def __init__(self, path: str | Path) -> None:
        """Opens or makes the file. Refused where it is not a store of a version we know."""
        self._path = str(path)
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        with self._translated():
            connection = sqlite3.connect(
                self._path,
                timeout=BUSY_TIMEOUT_S,
                isolation_level=None,  # transactions are begun by hand
                check_same_thread=False,
            )
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
        self._connection = connection

    def get(self, key: str) -> Versioned | None:
        check_key(key)
        with self._reading() as connection:
            row = connection.execute(
                "SELECT value, version FROM entries WHERE key = ?", (key.encode(),)
            ).fetchone()
        return Versioned(*row) if row else None

    def put(self, key: str, value: bytes) -> int:
        check_key(key)
        check_value(key, value)
        with self._writing() as connection:
            return _set(connection, key, value)

    def compare_and_set(self, key: str, value: bytes, expected_version: int) -> int:
        check_key(key)
        check_value(key, value)
        with self._writing() as connection:
            check_version(key, _version(connection, key), expected_version)
            return _set(connection, key, value)

    def delete(self, key: str, expected_version: int | None = None) -> bool:
        check_key(key)
        with self._writing() as connection:
            if expected_version is not None:
                check_version(key, _version(connection, key), expected_version)
            cursor = connection.execute("DELETE FROM entries WHERE key = ?", (key.encode(),))
            return cursor.rowcount > 0

    def scan(self, prefix: str) -> Iterator[Entry]:
        check_prefix(prefix)
        start = prefix.encode()
        page = self._page(start, start)  # now, so that a closed store says so at the call
        return self._pages(start, page)

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _pages(self, prefix: bytes, page: list[Entry]) -> Iterator[Entry]:
        while page:
            yield from page
            if len(page) < SCAN_PAGE:
                return
            page = self._page(prefix, page[-1].key.encode() + b"\0")

    def _page(self, prefix: bytes, first: bytes) -> list[Entry]:
        with self._reading() as connection:
            rows = connection.execute(_PAGE, (first, prefix + _AFTER_UTF8, SCAN_PAGE)).fetchall()
        return [Entry(key.decode(), value, version) for key, value, version in rows]

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        try:
            self._check_schema(connection)
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    def _check_schema(self, connection: sqlite3.Connection) -> None:
        application = _pragma(connection, "application_id")
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if application == 0 and tables == 0:
            for statement in _SCHEMA:
                connection.execute(statement)
            return
        if application != _APPLICATION_ID:
            raise Refused(
                f"{self._path} is a database of something else; name another file for the store"
            )
        version = _pragma(connection, "user_version")
        if version > SCHEMA_VERSION:
            raise Refused(
                f"{self._path} has schema {version}, this kvfabric knows up to "
                f"{SCHEMA_VERSION}; run the newer kvfabric that wrote it"
            )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._translated():
            if self._connection is None:
                raise Refused(f"the store {self._path} is closed; open it again")
            yield self._connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translate(error) from error

    def _translate(self, error: sqlite3.Error) -> FabricError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        where = f"the store {self._path}"
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Retry(f"{where} is busy: another process held it for {BUSY_TIMEOUT_S:g} s")
        if code == sqlite3.SQLITE_FULL:
            return Retry(f"{where} has no room on its disk; free some")
        if code == sqlite3.SQLITE_NOTADB:
            return Refused(f"{self._path} is not a store; name another file")
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            return Refused(f"{where} cannot be written: {error}; mind its folder and rights")
        return Broken(f"{where} failed: {error}; restore it, or start with a new file")


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _version(connection: sqlite3.Connection, key: str) -> int:
    row = connection.execute("SELECT version FROM entries WHERE key = ?", (key.encode(),))
    found = row.fetchone()
    return int(found[0]) if found else ABSENT


def _set(connection: sqlite3.Connection, key: str, value: bytes) -> int:
    cursor = connection.execute("UPDATE versions SET last = last + 1 RETURNING last")
    version = int(cursor.fetchall()[0][0])
    connection.execute(_SET, (key.encode(), value, version))
    return version
