"""What only a file can do: survive kill -9, be foreign, newer, locked or out of reach."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from kvfabric.errors import Refused, Retry
from kvfabric.stores import sqlite
from kvfabric.stores.sqlite import SqliteStore

# Says each number only after the store has said that it is set.
WRITER = """
import sys
from kvfabric.stores.sqlite import SqliteStore
store = SqliteStore(sys.argv[1])
number = 0
while True:
    number += 1
    store.put(f"key/{number:06}", str(number).encode())
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


def test_what_was_answered_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    # Given a process that writes and is killed while it does
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    with writer.stdout:
        said = [int(writer.stdout.readline()) for _ in range(50)]
        writer.kill()
        said += [int(line) for line in writer.stdout.read().split()]
    writer.wait(timeout=30)

    # When the file is opened again
    store = SqliteStore(path)

    # Then everything it had said is there
    found = {entry.key: entry.value for entry in store.scan("key/")}
    assert {f"key/{number:06}": str(number).encode() for number in said}.items() <= found.items()
    assert len(found) - len(said) <= 1  # at most one was set and not yet said
    store.close()


def test_a_store_syncs_every_commit(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db")

    connection = store._connection
    assert connection is not None
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    store.close()


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"these are notes, not a database\n" * 100)
    before = path.read_bytes()

    with pytest.raises(Refused, match=r"notes.txt is not a store; name another file"):
        SqliteStore(path)
    assert path.read_bytes() == before


def test_the_database_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE entries (mine TEXT)")
    other.commit()
    other.close()
    before = path.read_bytes()

    with pytest.raises(Refused, match="a database of something else"):
        SqliteStore(path)
    assert path.read_bytes() == before


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    SqliteStore(path).close()
    newer = sqlite3.connect(path)
    newer.execute(f"PRAGMA user_version = {sqlite.SCHEMA_VERSION + 1}")
    newer.close()

    with pytest.raises(Refused, match="has schema 2, this kvfabric knows up to 1"):
        SqliteStore(path)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="mind its folder and rights"):
        SqliteStore(tmp_path / "nowhere" / "store.db")


def test_a_store_that_another_process_holds_says_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store.db"
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.05)
    store = SqliteStore(path)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")

    with pytest.raises(Retry, match="is busy"):
        store.put("key", b"")

    holder.execute("ROLLBACK")
    holder.close()
    assert store.put("key", b"") > 0
    store.close()


def test_two_stores_on_one_file_see_each_other(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    one, two = SqliteStore(path), SqliteStore(path)

    version = one.put("key", b"1")

    assert two.get("key") == (b"1", version)
    assert two.compare_and_set("key", b"2", version) > version
    one.close()
    two.close()
