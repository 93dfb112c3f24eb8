"""`kvfabric bench`: the options, the progress bar, the table and the JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import Progress

from kvfabric.settings import parse_size
from kvfabric_client.bench import datapath, engine
from kvfabric_client.bench.attention import command as attention
from kvfabric_client.bench.plan import NAMES, SIZES, Plan
from kvfabric_client.bench.report import size_text
from kvfabric_client.bench.rounds import Case

DEFAULT: Final = Plan()

app = typer.Typer(help="Measure the fabric on this machine, each figure beside its limit.")
app.command("engine")(engine.command)
app.command("attention")(attention.command)


@app.callback(invoke_without_command=True)
def data_path(
    context: typer.Context,
    rounds: Annotated[int, typer.Option(help="Rounds that the medians are of.")] = DEFAULT.rounds,
    sizes: Annotated[str, typer.Option(help="Sizes of a shard, with commas.")] = ",".join(
        size_text(size).replace(" ", "") for size in SIZES
    ),
    only: Annotated[
        list[str] | None, typer.Option(help=f"Only this figure; repeatable: {', '.join(NAMES)}.")
    ] = None,
    memory: Annotated[str, typer.Option(help="The node's memory.")] = "2GiB",
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Put, get, view and match at one node of its own, beside bare copies and sockets."""
    if context.invoked_subcommand:
        return
    try:
        size_bytes = [parse_size(size) for size in sizes.split(",")]
        memory_bytes = parse_size(memory)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--sizes, --memory") from error
    plan = Plan(only or NAMES, size_bytes, rounds, memory_bytes)
    console = Console()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting a node", total=plan.steps)

        def advance(case: Case) -> None:
            text = f"{case.name} {size_text(case.size_bytes)}"
            progress.update(task, advance=1, description=text)

        report = datapath.run(plan, advance)
    console.print(report.table())
    if json:
        report.write_json(json)
