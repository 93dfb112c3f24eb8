"""A failpoint fells its own process, at the asked place and time, and nowhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from kvfabric.errors import Refused
from kvfabric.failpoints import ENVIRONMENT, POINTS, Failpoints

CHILD = """
from kvfabric.failpoints import reach
for _ in range(2):
    print("before", flush=True)
    reach("borrow.seen")
    reach("pull.started")
print("end", flush=True)
"""


def run(setting: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, ENVIRONMENT: setting},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("setting", "printed"), [("borrow.seen=kill", 1), ("pull.started=kill:2", 2)]
)
def test_the_process_dies_where_it_was_told_to(setting: str, printed: int) -> None:
    ended = run(setting)

    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout.splitlines() == ["before"] * printed


def test_without_a_setting_nothing_happens() -> None:
    ended = run("")

    assert ended.returncode == 0
    assert ended.stdout.endswith("end\n")


@pytest.mark.parametrize("setting", ["nowhere=kill", "borrow.seen=explode", "borrow.seen=kill:x"])
def test_what_cannot_be_is_refused_with_the_places_there_are(setting: str) -> None:
    with pytest.raises(Refused, match=r"take NAME=kill.*borrow\.seen"):
        Failpoints(setting)


def test_every_place_says_who_and_where() -> None:
    assert all(": " in text for text in POINTS.values())
