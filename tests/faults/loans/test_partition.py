"""A partition between two nodes, healed later: on real network stacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

INSIDE = Path(__file__).with_name("partition_inside.py")
TIMEOUT_S = 200.0
# A mount namespace too: the names of the hosts are nobody else's business.
SCRIPT = """
ip link set lo up && mkdir -p /run/netns && mount -t tmpfs none /run/netns &&
exec "$0" -m pytest -q -p no:cacheprovider "$1"
"""


def test_a_partition_between_debtor_and_creditor_heals() -> None:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("needs root and unshare for network namespaces")

    ended = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", SCRIPT, sys.executable, str(INSIDE)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )

    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    assert "1 passed" in ended.stdout
