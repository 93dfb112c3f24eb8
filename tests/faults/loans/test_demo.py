"""`kvfabric demo lending`, smaller: five real processes, one of which is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]


def test_a_sequence_outgrows_its_home_and_outlives_two_creditors(tmp_path: Path) -> None:
    result = tmp_path / "lending.json"

    done = subprocess.run(
        [
            *(sys.executable, "-m", "kvfabric_client.cli.main", "demo", "lending"),
            *("--times", "6", "--home", "4MiB", "--json", str(result)),
        ],
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(result.read_text())
    assert said["failure"] == ""
    assert said["times_home"] >= 6
    assert [(each["wrong"], each["missing"]) for each in said["readings"]] == [(0, 0)] * 3
    assert said["books"][0] == said["books"][1] > 0
    assert said["holdings"]["east drained"]["east"]["held"] == 0
    assert said["holdings"]["south killed"]["south"]["state"] == "lost"
    assert "loan   " in done.stdout
    assert "move   drain east" in done.stdout
