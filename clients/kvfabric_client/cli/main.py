"""The command `kvfabric` itself: which commands there are, and how a failure is said."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvfabric_client.cli import cluster, doctor, keys, loans, moves, rules, shows, simulate, status


class _OneLineErrors(TyperGroup):
    """Says a FabricError in one red line that names the remedy, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        from kvfabric.errors import FabricError

        try:
            return super().invoke(ctx)
        except FabricError as error:
            typer.secho(f"kvfabric: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="kvfabric",
    cls=_OneLineErrors,
    help="A distributed memory fabric for LLM serving.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(cluster.up)
app.command()(cluster.down)
app.command()(status.status)
app.command()(keys.explain)
app.command()(keys.purge)
app.command()(moves.migrate)
app.command()(moves.drain)
app.command()(moves.moves)
app.command()(loans.ledger)
app.command()(loans.plans)
app.command()(rules.policy)
app.command()(rules.replicas)
app.command()(rules.pin)
app.command()(doctor.doctor)
app.command(context_settings=shows.PASS_ON)(shows.demo)
app.command(context_settings=shows.PASS_ON)(shows.bench)
app.command()(simulate.simulate)


@app.command()
def version() -> None:
    """The version of this installation, and of the protocol that it speaks."""
    from importlib.metadata import version as installed

    from kvfabric.types import PROTOCOL_VERSION

    typer.echo(f"kvfabric {installed('kvfabric')}, protocol {PROTOCOL_VERSION}")


@app.callback()
def _options(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what is done, to standard error.")
    ] = False,
) -> None:
    import os

    from kvfabric import logs

    logs.configure("debug" if verbose else os.environ.get(logs.LEVEL_VARIABLE) or "warning")


if __name__ == "__main__":
    app()
