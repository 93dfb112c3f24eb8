"""How every demo ends: its result in a file and in tables, and a status that says what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Protocol

import typer
from rich.console import Console
from rich.table import Table

Json = Annotated[Path, typer.Option(help="Where the result is written.")]


class Result(Protocol):
    """What a demo saw."""

    @property
    def failure(self) -> str:
        """Why this is no success, or nothing."""

    def write_json(self, path: Path) -> None:
        """Writes all of it, making the folder. Refused where that cannot be written."""


def conclude(console: Console, result: Result, json: Path, *tables: Callable[[], Table]) -> None:
    """SystemExit(1), in the end, where it is no success."""
    result.write_json(json)
    for table in tables:
        console.print(table())
    console.print(f"also in {json}")
    if result.failure:
        console.print(f"[red]{result.failure}[/]")
        raise SystemExit(1)  # also through the command line that hands on to this one
