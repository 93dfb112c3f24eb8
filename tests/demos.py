"""`kvfabric demo NAME` as a person runs it, to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def demo(name: str, folder: Path, timeout_s: float, *options: str) -> tuple[dict[str, Any], str]:
    """What it wrote as JSON, and what it printed. Fails where it fails."""
    result = folder / f"{name}.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kvfabric_client.cli.main", "demo", name),
            *(*options, "--json", str(result)),
        ],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said: dict[str, Any] = json.loads(result.read_text())
    return said, done.stdout
