"""`kvfabric bench attention`: its options, the progress bar, the table and the JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import Progress

from kvfabric.settings import parse_size
from kvfabric_client.bench.attention.plan import NAMES, Plan
from kvfabric_client.bench.attention.run import run
from kvfabric_client.bench.report import size_text
from kvfabric_client.bench.rounds import Case

DEFAULT: Final = Plan()


def command(
    rounds: Annotated[int, typer.Option(help="Rounds that the medians are of.")] = DEFAULT.rounds,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Only this figure; repeatable: {', '.join(NAMES)}.")
    ] = None,
    memory: Annotated[
        str, typer.Option(help="KV that is attended in turn; the limit reads as much.")
    ] = size_text(DEFAULT.memory_bytes).replace(" ", ""),
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Attention at the node that holds the KV, beside plain reads, bare sockets and fetching."""
    try:
        memory_bytes = parse_size(memory)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--memory") from error
    plan = Plan(only or NAMES, rounds, memory_bytes)
    console = Console()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting a node", total=plan.steps)

        def advance(case: Case) -> None:
            progress.update(task, advance=1, description=case.name)

        report = run(plan, advance)
    console.print(report.table())
    if json:
        report.write_json(json)
