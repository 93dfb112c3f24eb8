"""Finding and ending the processes of one `up`, on real processes."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from kvfabric.cluster import processes
from kvfabric.cluster.processes import MARK_VARIABLE, Process, end, marked, signal_one

Start = Callable[..., "subprocess.Popen[bytes]"]
READY = "print('ready', flush=True); time.sleep(600)"


@pytest.fixture
def start() -> Iterator[Start]:
    """start(mark, code) -> a Python process that has said that it is ready."""
    started: list[subprocess.Popen[bytes]] = []

    def run(mark: str, code: str = f"import time; {READY}") -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {MARK_VARIABLE: mark},
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def mark() -> str:
    return secrets.token_hex(8)


def test_only_processes_with_the_mark_are_found(start: Start, mark: str) -> None:
    ours = start(mark)
    start(mark + "0")

    assert [process.pid for process in marked(mark)] == [ours.pid]


def test_the_mark_is_inherited_by_what_a_process_starts(start: Start, mark: str) -> None:
    code = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', "
        f"'import time; time.sleep(600)'], start_new_session=True); {READY}"
    )
    parent = start(mark, code)

    found = marked(mark)
    killed, left = end(mark, grace_s=10, kill_s=10)

    assert found[0].pid == parent.pid
    assert len(found) == 2
    assert (killed, left) == (0, [])


def test_a_process_that_ignores_sigterm_is_killed(start: Start, mark: str) -> None:
    stubborn = start(
        mark, f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); {READY}"
    )

    killed, left = end(mark, grace_s=0.2, kill_s=10)

    assert (killed, left) == (1, [])
    assert stubborn.wait(10) == -signal.SIGKILL


def test_a_process_that_only_has_the_id_is_not_signalled(start: Start, mark: str) -> None:
    child = start(mark)
    (found,) = marked(mark)
    another = Process(found.pid, found.started_ticks - 1)

    assert not signal_one(another, mark, signal.SIGKILL)
    assert not signal_one(found, "another mark", signal.SIGKILL)
    assert child.poll() is None
    assert signal_one(found, mark, signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL


def test_a_zombie_counts_as_gone(start: Start, mark: str) -> None:
    child = start(mark)
    (found,) = marked(mark)
    child.kill()

    assert processes.wait(found, time.monotonic() + 10)
    assert marked(mark) == []
