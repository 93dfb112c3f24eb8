"""Moves, drains and rules: what the commands ask, how they wait, and how they exit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from kvfabric.errors import FabricError, Unreachable
from kvfabric.keys import namespace_id
from kvfabric.manager.service import ManagerServer, ManagerSettings
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Namespace
from kvfabric_client.cli import moves
from kvfabric_client.cli.main import app
from kvfabric_client.manager import Manager

SPACE = f"{'00' * 32}:{b'salt'.hex()}"
ROOM = namespace_id(Namespace("default", bytes(32), b"salt"))
KEY = "11" * 32


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ManagerServer]:
    """A manager without nodes, which the environment names."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("KVFABRIC_RUNTIME_DIR", str(folder))
    monkeypatch.setattr(moves, "POLL_S", 0.0)
    server = ManagerServer(ManagerSettings(listen="127.0.0.1:0", runtime_dir=str(folder)))
    server.start()
    monkeypatch.setenv("KVFABRIC_MANAGER", server.address)
    yield server
    server.stop()


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})
    structlog.reset_defaults()
    return done.exit_code, done.stdout, done.stderr


def script(monkeypatch: pytest.MonkeyPatch, name: str, *answers: Any) -> list[tuple[Any, Any]]:
    """A call of the manager's that gives these answers, the last one again and again."""
    asked: list[tuple[Any, Any]] = []
    left = list(answers)

    def call(self: Manager, *arguments: Any, **rest: Any) -> Any:
        asked.append((arguments, rest))
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, FabricError):
            raise answer
        return answer

    monkeypatch.setattr(Manager, name, call)
    return asked


def move(state: str, **fields: Any) -> control_pb2.Move:
    number = control_pb2.MoveState.Value(f"MOVE_STATE_{state}")
    return control_pb2.Move(move=5, kind="migrate", source="a", state=number, keys=8, **fields)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("migrate",), "--from"),
        (("migrate", KEY), "--namespace"),
        (("migrate", "xy", "--namespace", SPACE), "KEY"),
        (("migrate", "--from", "a", "--rate", "fast"), "--rate"),
        (("drain",), "node"),
        (("drain", "a", "--timeout", "-1"), "--timeout"),
        (("drain", "a", "--rate", "fast"), "--rate"),
        (("policy", "--replicas", "0"), "--replicas"),
        (("policy", "--namespace", "00"), "--namespace"),
        (("pin", KEY), "--namespace"),
        (("replicas", KEY, "--count", "2"), "--namespace"),
        (("replicas", KEY, "--namespace", SPACE), "--count"),
        (("replicas", "--count", "2"), "--count"),
        (("replicas", KEY, "--namespace", SPACE, "--count", "17"), "--count"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_asked(
    arguments: tuple[str, ...], named: str
) -> None:
    status, _, err = run(*arguments)

    assert status == 2
    assert named.lower() in err.lower()


def test_without_a_manager_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFABRIC_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("KVFABRIC_MANAGER", raising=False)

    status, _, err = run("moves")

    assert status == 1
    assert "`kvfabric up` starts a fabric" in err


def test_policies_are_set_shown_and_removed(manager: ManagerServer) -> None:
    assert "every shard has one replica" in run("policy")[1]
    run("policy", "--replicas", "2")
    run("policy", "--namespace", SPACE, "--hot", "3")
    status, out, _ = run("policy", "--namespace", SPACE, "--replicas", "4", "--json")
    assert status == 0
    assert json.loads(out) == [
        {"namespace_id": "", "replicas": 2, "hot_replicas": 0},
        {"namespace_id": ROOM.hex(), "replicas": 4, "hot_replicas": 3},
    ]
    out = run("policy", "--remove")[1]

    assert "all others" not in out
    assert ROOM.hex()[:32] in out


def test_counts_of_single_shards_are_set_shown_and_taken_back(manager: ManagerServer) -> None:
    assert "no shard has a count of its own" in run("replicas")[1]
    status, out, _ = run("replicas", KEY, "--namespace", SPACE, "--count", "3", "--json")
    assert (status, json.loads(out)) == (0, {"keys": 1, "held": 0, "replicas": 3})
    run("replicas", KEY, "22" * 32, "--namespace", SPACE, "--count", "2")
    told = {"namespace_id": ROOM.hex(), "replicas": 2}
    assert json.loads(run("replicas", "--json")[1]) == [
        {**told, "key": KEY},
        {**told, "key": "22" * 32},
    ]
    out = run("replicas", "22" * 32, "--namespace", SPACE, "--remove")[1]
    assert "the policy rules again of 1 keys" in out.replace("\n", " ")
    out = run("replicas")[1]

    assert KEY[:32] in out
    assert "22" * 16 not in out


def test_keys_are_pinned_and_unpinned_whether_they_are_there_or_not(
    manager: ManagerServer,
) -> None:
    status, out, _ = run("pin", KEY, "--namespace", SPACE, "--json")
    assert (status, json.loads(out)) == (0, {"keys": 1, "held": 0, "pinned": True})
    assert "no longer pinned" in run("pin", KEY, "--namespace", SPACE, "--unpin")[1]


def test_moves_of_a_quiet_fabric(manager: ManagerServer) -> None:
    assert run("moves")[:2] == (0, "nothing moves, and nothing did lately\n")
    assert json.loads(run("moves", "--json")[1]) == []
    status, _, err = run("moves", "--cancel", "3")
    assert status == 1
    assert "no move 3" in err


def test_moves_are_shown_with_their_state(
    manager: ManagerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, "moves", [move("DROPPING", copied=8, dropped=2, size_bytes=1 << 20)])

    out = run("moves")[1]

    assert "dropping" in out
    assert "8/8" in out
    assert "1.0 MiB" in out


@pytest.mark.parametrize(
    ("state", "status", "said"),
    [
        ("DONE", 0, "8 shards copied, 8 dropped"),
        ("FAILED", 1, "failed  8 of 8 shards copied: n1 went away"),
        ("CANCELLED", 1, "cancelled"),
        ("COPYING", 3, "copying"),
    ],
)
def test_a_migration_is_watched_to_its_end(
    manager: ManagerServer,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    status: int,
    said: str,
) -> None:
    asked = script(monkeypatch, "migrate", control_pb2.MigrateResponse(move=5, keys=8))
    last = move(state, copied=8, dropped=8, why="n1 went away" if state == "FAILED" else "")
    away = Unreachable("away")
    script(monkeypatch, "moves", [move("COPYING", copied=2)], away, [last])

    found = run("migrate", "--from", "a", "--to", "b", "--rate", "1MiB", "--timeout", "0.2")

    assert found[0] == status
    assert said in found[1]
    request = asked[0][0][0]
    assert (request.source, request.destination, request.bytes_per_s) == ("a", "b", 1 << 20)


def test_a_migration_tells_lines_of_json(
    manager: ManagerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, "migrate", control_pb2.MigrateResponse(move=5, keys=8))
    script(monkeypatch, "moves", [move("COPYING", copied=2)], [move("DONE", copied=8)])

    _, out, _ = run("migrate", KEY, "--namespace", SPACE, "--json")

    told = [json.loads(line) for line in out.splitlines()]
    assert [(each["state"], each["copied"]) for each in told] == [("copying", 2), ("done", 8)]


def test_a_migration_need_not_be_waited_for(
    manager: ManagerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, "migrate", control_pb2.MigrateResponse(move=5, keys=8))

    assert run("migrate", "--from", "a", "--detach")[:2] == (
        0,
        "move 5 of 8 shards; kvfabric moves shows it\n",
    )


def test_a_move_that_its_manager_forgot_is_said_so(
    manager: ManagerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, "migrate", control_pb2.MigrateResponse(move=5, keys=8))
    script(monkeypatch, "moves", [move("COPYING")], [])

    status, _, err = run("migrate", "--from", "a")

    assert status == 1
    assert "started anew" in err


def test_a_drain_waits_until_the_node_is_empty_and_outlasts_the_manager_s_absence(
    manager: ManagerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = control_pb2.DrainResponse(left_shards=3, moved_shards=1, waiting="3 shards")
    empty = control_pb2.DrainResponse(empty=True, moved_shards=4)
    asked = script(monkeypatch, "drain", busy, busy, Unreachable("away"), empty)

    status, out, _ = run("drain", "n1", "--rate", "2MiB")

    assert status == 0
    assert "n1 is empty (4 shards went) and may be deleted" in out
    assert asked[0][0][0] == "n1"
    assert asked[0][1] == {"bytes_per_s": 2 << 20}


def test_a_drain_tells_what_changes_as_lines_of_json(
    manager: ManagerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = control_pb2.DrainResponse(left_shards=3, left_bytes=9, waiting="3 shards, 1 leases")
    script(monkeypatch, "drain", busy, busy, control_pb2.DrainResponse(empty=True))

    status, out, _ = run("drain", "n1", "--json")

    assert status == 0
    first, last = (json.loads(line) for line in out.splitlines())
    assert (first["empty"], first["left_bytes"], first["waiting"]) == (
        False,
        9,
        "3 shards, 1 leases",
    )
    assert last["empty"]


def test_a_drain_that_is_not_over_in_time_exits_with_3_and_says_what_it_waits_for(
    manager: ManagerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, "drain", control_pb2.DrainResponse(waiting="2 open sequences"))

    status, out, _ = run("drain", "n1", "--timeout", "0.05")

    assert status == 3
    assert "2 open sequences" in out


def test_a_manager_that_never_answers_is_no_empty_node(
    manager: ManagerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, "drain", Unreachable("away"))

    status, _, err = run("drain", "n1", "--timeout", "0.05")

    assert status == 1
    assert "not known whether n1 is empty" in err


def test_a_drain_of_a_node_that_nobody_knows_is_refused(manager: ManagerServer) -> None:
    status, _, err = run("drain", "n9")

    assert status == 1
    assert "no node n9" in err


def test_a_drain_that_is_not_under_way_cannot_be_called_off(manager: ManagerServer) -> None:
    status, _, err = run("drain", "n9", "--cancel")

    assert status == 1
    assert "n9 is not being drained" in err


def test_a_drain_is_called_off(manager: ManagerServer, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, "drain", control_pb2.DrainResponse(waiting="called off: the node serves"))

    assert run("drain", "n9", "--cancel")[:2] == (0, "n9 serves again\n")
