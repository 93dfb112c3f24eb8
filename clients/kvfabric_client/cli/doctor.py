"""`kvfabric doctor`: what is missing or misconfigured on this machine, with the remedy."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from kvfabric_client.cli.common import Json, RuntimeDir, chosen_runtime_dir, console, print_json

if TYPE_CHECKING:
    from kvfabric_client.cli.checks.finding import Finding

_STYLES = {"ok": "green", "hint": "yellow", "broken": "red"}


def doctor(runtime_dir: RuntimeDir = None, as_json: Json = False) -> None:
    """Say what is missing or misconfigured on this machine, with the remedy.

    Changes nothing. Exits with 1 where something is broken; hints are not failures.
    """
    from kvfabric_client.cli.checks import CHECKS
    from kvfabric_client.cli.checks.finding import Level

    folder = chosen_runtime_dir(runtime_dir)
    findings: list[Finding] = []
    for check in CHECKS:
        findings.append(check(folder))
        if not as_json:
            _show(findings[-1])
    if as_json:
        print_json([asdict(finding) for finding in findings])
    if any(finding.level is Level.BROKEN for finding in findings):
        raise typer.Exit(1)


def _show(finding: Finding) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 1))
    row.add_column(width=6)
    row.add_column(width=17)
    row.add_column()
    row.add_row(Text(finding.level, _STYLES[finding.level]), finding.name, finding.text)
    out = console()
    out.print(row)
    if finding.remedy:
        out.print(Padding(Text(f"-> {finding.remedy}"), (0, 0, 0, 7)))
