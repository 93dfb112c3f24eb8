"""Runs a tool of the development environment over the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = Path(sys.executable).parent
TOOL_TIMEOUT_S = 300

Tool = Callable[..., str]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tool() -> Tool:
    """tool(name, *arguments) -> what it printed; fails with that where it finds fault."""

    def run(name: str, *arguments: str) -> str:
        done = subprocess.run(
            [name, *arguments],
            cwd=ROOT,
            env={**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TOOL_TIMEOUT_S,
        )
        if done.returncode:
            pytest.fail(f"{name} {' '.join(arguments)}\n{done.stdout}", pytrace=False)
        return done.stdout

    return run
