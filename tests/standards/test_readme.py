"""The README's Python examples do what the README says, on a real node."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfabric_nodes.node import Node
from kvfabric_nodes.settings import NodeSettings

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Iterator[Path]:
    """Of a node that serves, and whose books are right at the end."""
    node = Node(NodeSettings(node="n0", memory=16 << 20, runtime_dir=tmp_path / "run"))
    node.start()
    yield tmp_path / "run"
    node.check()
    node.stop()


EXAMPLES = re.findall(
    r"^```python\n(.*?)^```\n\nIt prints `([^`]+)`",
    README.read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)


def test_every_example_says_what_it_prints() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(EXAMPLES) == text.count("\n```python\n") == 3


@pytest.mark.parametrize(("example", "printed"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs_and_prints_what_the_readme_says(
    runtime_dir: Path, example: str, printed: str
) -> None:
    for _ in range(2):  # "in this process and in any other"
        done = subprocess.run(
            [sys.executable, "-c", example],
            env={**os.environ, "KVFABRIC_RUNTIME_DIR": str(runtime_dir)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == printed
