"""`kvfabric demo lending`: its options, its progress, the tables and out/lending.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvfabric.settings import parse_size
from kvfabric_client.demo.conclusion import Json, conclude
from kvfabric_client.demo.lending.run import run
from kvfabric_client.demo.steps import Steps

app = typer.Typer()


@app.command()
def lending(
    times: Annotated[
        int, typer.Option(min=2, max=64, help="How many times its home's memory it grows to.")
    ] = 19,
    home: Annotated[str, typer.Option(help="Memory of the home node.")] = "16MiB",
    json: Json = Path("out/lending.json"),
) -> None:
    """A sequence outgrows its home node; a creditor is drained, another one killed meanwhile.

    Logs of all processes are beside the JSON file. Exit status 1 where a byte was wrong or
    missing, or the books of loans differ.
    """
    try:
        home_bytes = parse_size(home)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--home") from error
    console = Console(highlight=False)
    result = run(times, home_bytes, json.parent / "lending-logs", Steps(console))
    conclude(console, result, json, result.who_holds_what, result.table)


if __name__ == "__main__":
    app()
