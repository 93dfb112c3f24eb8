"""`kvfabric demo lending`, smaller: five real processes, one of which is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.demos import demo

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]


def test_a_sequence_outgrows_its_home_and_outlives_two_creditors(tmp_path: Path) -> None:
    said, printed = demo("lending", tmp_path, 220, "--times", "6", "--home", "4MiB")

    assert said["failure"] == ""
    assert said["times_home"] >= 6
    assert [(each["wrong"], each["missing"]) for each in said["readings"]] == [(0, 0)] * 3
    assert said["books"][0] == said["books"][1] > 0
    assert said["holdings"]["east drained"]["east"]["held"] == 0
    assert said["holdings"]["south killed"]["south"]["state"] == "lost"
    assert "loan   " in printed
    assert "move   drain east" in printed
