"""`up` and `down` at their edges: nothing there, leftovers, two at once. The rest: tests/ray."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvfabric.cluster import deploy, keepers, record
from kvfabric.cluster.processes import MARK_VARIABLE
from kvfabric.errors import Conflict


def silent(_text: str) -> None:
    pass


def test_down_without_a_fabric_finds_none(tmp_path: Path) -> None:
    assert deploy.down(tmp_path, silent) == deploy.Down(found=False)
    assert deploy.down(tmp_path / "missing", silent) == deploy.Down(found=False)


def test_down_after_a_crash_ends_what_was_left_and_removes_its_traces(tmp_path: Path) -> None:
    mark = secrets.token_hex(8)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    orphan = subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"],
        env=os.environ | {MARK_VARIABLE: mark},
        stdout=subprocess.PIPE,
    )
    with orphan:
        assert orphan.stdout is not None
        orphan.stdout.readline()
        record.write(tmp_path, record.Fabric("", "", mark, str(scratch)))
        assert deploy.running(tmp_path)

        assert deploy.down(tmp_path, silent) == deploy.Down(found=True, killed=0)

        assert orphan.wait(10) < 0
    assert [path.name for path in tmp_path.iterdir()] == [deploy.LOCK_NAME]


def test_a_second_up_says_that_one_is_up_already(tmp_path: Path) -> None:
    mark = secrets.token_hex(8)
    record.write(tmp_path, record.Fabric("127.0.0.1:1", "", mark, "", nodes=("n0",)))
    running = subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"],
        env=os.environ | {MARK_VARIABLE: mark},
        stdout=subprocess.PIPE,
    )
    with running:
        assert running.stdout is not None
        running.stdout.readline()
        with pytest.raises(Conflict, match="kvfabric down"):
            deploy.up_local(tmp_path, nodes=1, memory_bytes=1 << 26, report=silent)
        assert running.poll() is None
        running.kill()


def test_two_at_once_are_kept_apart(tmp_path: Path) -> None:
    with deploy._locked(tmp_path), pytest.raises(Conflict, match="at work"):
        deploy.down(tmp_path, silent)


def test_a_socket_is_stale_when_nobody_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left, socket.socket(socket.AF_UNIX) as listening:
        left.bind(str(tmp_path / "left.sock"))
        left.close()
        with socket.socket(socket.AF_UNIX) as keeper:
            keeper.bind(str(tmp_path / "left.keeper"))
        listening.bind(str(tmp_path / "alive.sock"))
        listening.listen()

        stale = [path.name for path in deploy.stale_sockets(tmp_path)]
        assert stale == ["left.sock", "left.keeper"]


def test_keepers_of_a_fabric_that_was_left_are_ended(tmp_path: Path) -> None:
    script = (
        "import socket, sys, time\n"
        "sock = socket.socket(socket.AF_UNIX); sock.bind(sys.argv[1]); sock.listen()\n"
        "print(flush=True); time.sleep(600)"
    )
    started: list[subprocess.Popen[bytes]] = []
    for node in ("n0", "stranger"):
        command = [sys.executable, "-c", script, str(tmp_path / f"{node}.keeper")]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        assert started[-1].stdout is not None
        started[-1].stdout.readline()
    keeper, stranger = started
    with keeper, stranger:
        keepers.end(tmp_path, ["n0", "n1"], time.monotonic() + 10)
        assert keeper.wait(10) == -signal.SIGTERM
        assert stranger.poll() is None
        stranger.kill()
