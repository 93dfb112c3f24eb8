"""`kvfabric demo` and `kvfabric bench`: handed on whole to the packages that own them.

They import numpy, and more; so each is imported when it is run, and brings its own options.
"""

from __future__ import annotations

import importlib
from typing import Any

import typer

# Everything behind the command's name, --help included, belongs to the other app.
PASS_ON: dict[str, Any] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}


DEMOS = {
    "attention": "kvfabric_client.demo.attention.command",
    "lending": "kvfabric_client.demo.lending.command",
}


def demo(context: typer.Context) -> None:
    """Two engine processes, one after the other, share KV through a fabric.

    `demo lending`: a sequence outgrows its home node many times over. `demo attention`: a model
    decodes while its KV lies on three nodes.
    """
    name = context.args[0] if context.args else ""
    if name in DEMOS:
        del context.args[0]
    _hand_on(DEMOS.get(name, "kvfabric_client.demo.command"), context)


def bench(context: typer.Context) -> None:
    """Measure the fabric on this machine, each figure beside its limit."""
    _hand_on("kvfabric_client.bench.command", context)


def _hand_on(module: str, context: typer.Context) -> None:
    app: typer.Typer = importlib.import_module(module).app
    command = typer.main.get_command(app)
    arguments = list(context.args)
    # Not standalone: errors go on to our own caller, and an Exit comes back as its number.
    status = command.main(arguments, prog_name=context.command_path, standalone_mode=False)
    if isinstance(status, int) and status:
        raise typer.Exit(status)
