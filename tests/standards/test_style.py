"""What machines can keep of the code's style, types and import directions."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def test_ruff_finds_nothing(tool: Callable[..., str]) -> None:
    tool("ruff", "check")


def test_every_file_is_formatted(tool: Callable[..., str]) -> None:
    tool("ruff", "format", "--diff")


@pytest.mark.timeout(300)  # without a cache mypy reads the types of every dependency
def test_mypy_is_content_in_strict_mode(tool: Callable[..., str]) -> None:
    tool("mypy")


def test_imports_run_one_way(tool: Callable[..., str]) -> None:
    report = tool("lint-imports", "--no-cache")
    assert "0 broken" in report
