"""`kvfabric demo`: its options, its progress, the table and out/demo.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvfabric.errors import Refused
from kvfabric_client.demo.conclusion import Json, conclude
from kvfabric_client.demo.protocol import ENGINES
from kvfabric_client.demo.run import Plan, run
from kvfabric_client.demo.steps import Steps

app = typer.Typer()

MIN_TOKENS = 256
CHOICES = ("auto", *ENGINES)


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(help="Tokens of each prompt.", min=MIN_TOKENS)] = 4000,
    runs: Annotated[int, typer.Option(help="Prompts; times are medians over them.", min=1)] = 3,
    engine: Annotated[str, typer.Option(help=f"{', '.join(CHOICES)}.")] = "auto",
    model: Annotated[
        Path | None, typer.Option(help="Folder of another causal model, with its tokenizer.")
    ] = None,
    json: Json = Path("out/demo.json"),
) -> None:
    """Two engine processes, one after the other, share the KV of long prompts by a fabric.

    Logs of all processes are beside the JSON file. Exit status 1 where tokens differ or
    nothing was loaded.
    """
    if engine not in CHOICES:
        raise Refused(f"no engine is called {engine!r}; choose from {', '.join(CHOICES)}")
    console = Console(highlight=False)
    result = run(Plan(tokens, runs, engine, model, json.parent), Steps(console))
    conclude(console, result, json, result.table)


if __name__ == "__main__":
    app()
