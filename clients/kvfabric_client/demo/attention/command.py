"""`kvfabric demo attention`: its options, its progress, the tables and out/attention.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvfabric_client.demo.attention.run import run
from kvfabric_client.demo.conclusion import Json, conclude
from kvfabric_client.demo.steps import Steps

app = typer.Typer()


@app.command()
def attention(
    tokens: Annotated[
        int, typer.Option(min=3072, max=7936, help="Tokens of the text that the model goes on.")
    ] = 4096,
    answer: Annotated[
        int, typer.Option(min=4, max=64, help="Tokens decoded before the drain, and after it.")
    ] = 16,
    json: Json = Path("out/attention.json"),
) -> None:
    """A real model decodes from a long text whose KV lies on three memory nodes.

    The engine's process keeps less than an eighth of it, the prefill included; one node is
    drained while tokens are decoded. Logs of all processes are beside the JSON file. Exit
    status 1 where tokens differ from a run with all KV in one process, or it kept more.
    """
    console = Console(highlight=False)
    result = run(tokens, answer, json.parent, Steps(console))
    conclude(console, result, json, result.who_attends, result.decoding, result.table)


if __name__ == "__main__":
    app()
