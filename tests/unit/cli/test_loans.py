"""`kvfabric ledger` and `kvfabric plans`, against a gManager in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import structlog
from typer.testing import CliRunner

from kvfabric.lending.loans import Loan, LoanState, to_columns
from kvfabric.manager.service import ManagerServer, ManagerSettings
from kvfabric.rpc.v1 import control_pb2, control_pb2_grpc
from kvfabric_client.cli import loans
from kvfabric_client.cli.main import app

TIMEOUT_S = 20.0
MIB = 1024 * 1024


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ManagerServer]:
    server = ManagerServer(ManagerSettings(listen="127.0.0.1:0", store="memory:"))
    server.start()
    monkeypatch.setenv("KVFABRIC_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("KVFABRIC_MANAGER", server.address)
    yield server
    server.stop()


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})
    structlog.reset_defaults()  # the command logs to the runner's stderr, which is closed now
    assert done.exit_code == 0, done.stderr
    return done.stdout


def report(server: ManagerServer, node: str, *found: Loan) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        stub.Register(
            control_pb2.RegisterRequest(min_version=1, max_version=1, node=node, incarnation=1),
            timeout=TIMEOUT_S,
        )
        beat = control_pb2.HeartbeatRequest(
            node=node, incarnation=1, sequence=1, loans=to_columns(found)
        )
        next(stub.Heartbeat(iter([beat]), timeout=TIMEOUT_S))


def held(number: int, size_bytes: int, debtor: str = "n0", creditor: str = "n1") -> Loan:
    return Loan(number, debtor, 1, creditor, 1, LoanState.HELD, size_bytes)


def test_without_loans_and_plans_it_says_so(server: ManagerServer) -> None:
    assert run("ledger").strip() == "no node lends to another now"
    assert run("plans").strip() == "nothing was planned lately"
    assert json.loads(run("plans", "--json")) == []
    assert json.loads(run("ledger", "--json")) == {
        "lent_bytes": 0,
        "borrowed_bytes": 0,
        "loans": [],
    }


def test_a_loan_is_one_row_with_both_sides_words(server: ManagerServer) -> None:
    report(server, "n0", held(7, 5 * MIB), held(8, 2 * MIB))
    report(server, "n1", held(7, 5 * MIB), held(8, 1 * MIB), held(9, MIB))

    told = json.loads(run("ledger", "--json"))
    assert (told["lent_bytes"], told["borrowed_bytes"]) == (7 * MIB, 7 * MIB)
    assert [each["loan"] for each in told["loans"]] == [7, 8, 9]
    assert told["loans"][0]["creditor_says"] == {"state": "held", "bytes": 5 * MIB}
    assert told["loans"][0]["debtor_says"] == {"state": "held", "bytes": 5 * MIB}
    assert told["loans"][2]["debtor_says"] is None

    text = run("ledger")
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= 80
    (seventh,) = [line for line in lines if " 7 " in line]
    assert seventh.split() == ["n0", "n1", "7", "5.0", "MiB", "held"]
    assert "held, but the debtor says 2.0 MiB" in text
    assert "held, but the debtor knows of none" in text
    assert "lent 7.0 MiB, borrowed 7.0 MiB" in text


def test_status_shows_who_lends_and_who_borrows(server: ManagerServer) -> None:
    report(server, "n0", held(7, 5 * MIB))
    report(server, "n1", held(7, 5 * MIB))

    nodes = {each["name"]: each for each in json.loads(run("status", "--json"))["nodes"]}
    assert (nodes["n0"]["lent_bytes"], nodes["n0"]["borrowed_bytes"]) == (0, 5 * MIB)
    assert (nodes["n1"]["lent_bytes"], nodes["n1"]["borrowed_bytes"]) == (5 * MIB, 0)
    assert not nodes["n0"]["draining"]
    lines = [line.split() for line in run("status").splitlines()]
    assert ["n0", "0", "B", "5.0", "MiB"] in lines
    assert ["n1", "5.0", "MiB", "0", "B"] in lines


def test_plans_are_shown_with_their_reason(capsys: pytest.CaptureFixture[str]) -> None:
    plans = [
        control_pb2.Plan(
            age_ms=1500,
            debtor="n0",
            creditor=f"n{number}",
            sequence=3,
            size_bytes=64 * MIB,
            gain=12.5,
            why="9 requests wait",
        )
        for number in range(loans.LAST_PLANS + 2)
    ]
    loans._show_plans(plans)
    out = capsys.readouterr().out
    assert "1.5 s" in out
    assert "9 requests wait" in out
    assert "and 2 before that" in out
    assert loans._plan(plans[0]) == {
        "age_s": 1.5,
        "debtor": "n0",
        "creditor": "n0",
        "sequence": 3,
        "bytes": 64 * MIB,
        "tokens_per_s": 12.5,
        "why": "9 requests wait",
    }
