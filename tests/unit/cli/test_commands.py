"""The commands without a fabric: quick to load, clear in their errors, readable in 80 columns."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
import typer
from typer.testing import CliRunner

from kvfabric.cluster import record
from kvfabric.errors import Refused
from kvfabric.manager.service import ManagerServer, ManagerSettings
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric_client import texts
from kvfabric_client.cli import checks, status
from kvfabric_client.cli.checks import CHECKS, here, software
from kvfabric_client.cli.checks.finding import Check, Finding, Level
from kvfabric_client.cli.main import app

HEAVY = ("numpy", "ray", "torch", "vllm", "transformers", "pyarrow", "pydantic", "grpc")


@pytest.fixture
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty runtime directory, and no fabric from the environment."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("KVFABRIC_RUNTIME_DIR", str(folder))
    monkeypatch.delenv("KVFABRIC_MANAGER", raising=False)
    monkeypatch.delenv("KVFABRIC_HOME", raising=False)
    return folder


def run(*arguments: str, answer: str = "") -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(arguments), input=answer, env={"COLUMNS": "80"})
    structlog.reset_defaults()  # the command logs to the runner's stderr, which is closed now
    return done.exit_code, done.stdout, done.stderr


def test_help_loads_nothing_heavy_and_names_every_command() -> None:
    code = (
        "import sys\n"
        "from kvfabric_client.cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    names = "up down status explain purge migrate drain moves policy replicas pin doctor demo"
    for name in [*names.split(), "bench", "version"]:
        assert any(line.startswith(f"│ {name} ") for line in lines), name


def test_an_error_is_one_line_with_the_remedy(runtime_dir: Path) -> None:
    status_code, out, err = run("status")

    assert (status_code, out) == (1, "")
    assert err.startswith("kvfabric: ")
    assert "kvfabric up" in err
    assert len(err.splitlines()) == 1


def test_down_without_a_fabric_is_no_error(runtime_dir: Path) -> None:
    status_code, out, _ = run("down")

    assert status_code == 0
    assert out.startswith("nothing runs here")


@pytest.mark.parametrize(
    "arguments",
    [
        ("up", "--memory", "lots"),
        ("up", "--nodes", "0"),
        ("explain", "xyz"),
        ("explain", "abc"),
        ("purge", "--namespace", "00", "--yes"),
        ("purge", "--namespace", "00" * 32, "--key", "00", "--yes"),
        ("purge", "--yes"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_asked(
    runtime_dir: Path, arguments: tuple[str, ...]
) -> None:
    status_code, _, err = run(*arguments)

    assert status_code == 2
    assert arguments[1].lstrip("-") in err or "KEY" in err or "--" in err


def test_purge_asks_first(runtime_dir: Path) -> None:
    status_code, out, _ = run("purge", "--namespace", "00" * 32, answer="n\n")

    assert status_code == 1
    assert "Erase the whole namespace" in out
    assert "erased" not in out


def test_purge_fails_where_no_node_is_reached(runtime_dir: Path) -> None:
    status_code, _, err = run("purge", "--namespace", "00" * 32, "--yes")

    assert status_code == 1
    assert "not every node was reached" in err


def test_status_asks_the_manager_itself_in_spite_of_a_proxy(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    server = ManagerServer(ManagerSettings(listen="127.0.0.1:0", runtime_dir=str(runtime_dir)))
    server.start()
    try:
        monkeypatch.setenv("KVFABRIC_MANAGER", server.address)
        status_code, out, _ = run("status", "--json")
    finally:
        server.stop()

    assert status_code == 0
    told = json.loads(out)
    assert (told["nodes"], told["manager"]["alive"], told["manager"]["keys"]) == ([], True, 0)


def test_a_node_is_shown_with_its_fill_and_hit_rate() -> None:
    info = control_pb2.NodeInfo(node="n0", incarnation=7, alive=True, silent_ms=250)
    info.stats.tiers.add(
        tier=types_pb2.TIER_DRAM, capacity_bytes=1000, held_bytes=250, free_bytes=750
    )
    info.stats.counters.add(name=status.HITS, value=3)
    info.stats.counters.add(name=status.MISSES, value=1)

    node = status.view(info)

    assert (node.name, node.alive, node.incarnation, node.silent_s) == ("n0", True, 7, 0.25)
    assert node.hit_rate == 0.75
    assert (node.tiers[0].tier, node.tiers[0].fill) == ("dram", 0.25)


def test_a_node_that_was_never_asked_has_no_hit_rate() -> None:
    assert status.view(control_pb2.NodeInfo(node="n0")).hit_rate is None


def test_a_full_table_is_readable_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    info = control_pb2.NodeInfo(
        node="ray-01234567",
        alive=False,
        silent_ms=123_000,
        lent_bytes=999 << 30,
        borrowed_bytes=5 << 20,
    )
    info.stats.tiers.add(
        tier=types_pb2.TIER_DRAM, capacity_bytes=999 << 30, held_bytes=998 << 30, shards=1_234_567
    )
    manager: dict[str, object] = {"address": "", "alive": False}

    status._show(manager, [status.view(info)], "")

    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert any("ray-01234567" in line and "1,234,567" in line for line in lines)
    assert any("ray-01234567" in line and "5.0 MiB" in line for line in lines)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KiB"), (1536, "1.5 KiB"), (1 << 40, "1.0 TiB")],
)
def test_sizes_in_words(size_bytes: int, text: str) -> None:
    assert texts.size(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (12.4, "12 s"),
        (59.9, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert texts.duration(seconds) == text


# Doctor -------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [c for c in CHECKS if c is not software.vllm])
def test_every_check_tells_something_and_every_trouble_has_a_remedy(
    runtime_dir: Path, check: Check
) -> None:
    finding = check(runtime_dir)

    assert finding.text
    assert finding.level is Level.OK or finding.remedy


def test_a_runtime_directory_that_is_open_to_others_is_broken(runtime_dir: Path) -> None:
    runtime_dir.chmod(0o755)

    finding = here.directory(runtime_dir)

    assert finding.level is Level.BROKEN
    assert finding.remedy == f"chmod 700 {runtime_dir}"


def test_a_runtime_directory_too_long_for_sockets_is_broken(tmp_path: Path) -> None:
    assert here.directory(tmp_path / ("x" * 100)).level is Level.BROKEN


def test_a_socket_that_somebody_left_is_found(runtime_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(runtime_dir / "n7.sock"))

    assert "n7.sock" in here.leftovers(runtime_dir).text


def test_a_fabric_whose_processes_are_gone_is_found(runtime_dir: Path) -> None:
    record.write(runtime_dir, record.Fabric("127.0.0.1:9", "", "no such mark", ""))

    finding = here.leftovers(runtime_dir)

    assert (finding.level, finding.remedy) == (Level.HINT, "kvfabric down")
    assert here.manager(runtime_dir).level is Level.BROKEN


def test_a_hash_seed_is_pointed_out(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")

    assert software.hash_seed(runtime_dir).level is Level.HINT


def test_doctor_exits_with_1_only_where_something_is_broken(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Finding("a", Level.OK, "fine"), Finding("b", Level.HINT, "slow", "faster")]
    made: list[Check] = [lambda _dir, each=each: each for each in found]  # type: ignore[misc]
    monkeypatch.setattr(checks, "CHECKS", made)
    status_code, out, _ = run("doctor")
    assert status_code == 0
    assert "-> faster" in out

    made.append(lambda _dir: Finding("c", Level.BROKEN, "gone", "bring it back"))
    status_code, out, _ = run("doctor", "--json")
    assert status_code == 1
    assert [finding["level"] for finding in json.loads(out)] == ["ok", "hint", "broken"]


# Demo and bench ----------------------------------------------------------------------


def given(body: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a command of that body in the place of the bench's."""
    inner = typer.Typer()
    inner.command()(body)
    module = types.ModuleType("stand_in")
    module.app = inner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvfabric_client.bench.command", module)


def test_the_status_of_a_handed_on_command_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> None:
        raise typer.Exit(3)

    given(body, monkeypatch)

    assert run("bench")[0] == 3


def test_an_error_of_a_handed_on_command_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> None:
        raise Refused("no: do otherwise")

    given(body, monkeypatch)

    assert run("bench") == (1, "", "kvfabric: no: do otherwise\n")


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_help_of_a_handed_on_command_is_its_own(command: str) -> None:
    status_code, out, _ = run(command, "--help")

    assert status_code == 0
    assert f"Usage: root {command}" in out or f"{command} [OPTIONS]" in out


def test_version_tells_of_the_protocol_too() -> None:
    assert "protocol 1" in run("version")[1]
