"""`kvfabric up` and `kvfabric down`."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from kvfabric_client.cli.common import RuntimeDir, chosen_runtime_dir, console
from kvfabric_client.texts import size

if TYPE_CHECKING:
    from pathlib import Path

    from kvfabric.cluster.deploy import Report, Up

# In a Ray that others run the port cannot be probed from here, and must stay over restarts.
JOINED_MANAGER_PORT = 7400


def up(
    nodes: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Memory nodes; 1, or with --address all there are."),
    ] = None,
    memory: Annotated[str, typer.Option(help="Memory of each node, as 512MiB or 8GiB.")] = "1GiB",
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when it is up, and leave it running.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(help="host:port of a Ray that runs already; else one is started here."),
    ] = None,
    manager_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The gManager's port; else a free one.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Where the gManager keeps what is durable: redis://HOST:PORT/DB, else a file."
        ),
    ] = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Start a fabric: a gManager, and an rManager on every memory node, as Ray actors.

    Without --detach it stays in the foreground until Ctrl-C. With --address the actors are
    started in that Ray, on its nodes with the resource kvfabric_node, and left to it.
    """
    from kvfabric.cluster import deploy
    from kvfabric.settings import make_runtime_dir, parse_size

    try:
        memory_bytes = parse_size(memory)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--memory") from error
    if store:
        os.environ["KVFABRIC_MANAGER_STORE"] = store  # as the gManager's settings read it
    signal.signal(signal.SIGTERM, _interrupt)  # a service manager's way to say Ctrl-C
    folder = make_runtime_dir(chosen_runtime_dir(runtime_dir))
    out = console()
    with out.status("starting") as spinner:

        def report(text: str) -> None:
            spinner.update(text)
            out.print(f"[dim]· {text}[/dim]")

        if address is None:
            started = deploy.up_local(
                folder,
                nodes=nodes or 1,
                memory_bytes=memory_bytes,
                manager_port=manager_port or 0,
                attached=not detach,
                report=report,
            )
        else:
            started = deploy.up_joined(
                folder,
                address=address,
                nodes=nodes or 0,
                memory_bytes=memory_bytes,
                manager_port=manager_port or JOINED_MANAGER_PORT,
                report=report,
            )
    fabric = started.fabric
    out.print(
        f"[green]up[/green]  {len(fabric.nodes)} nodes ({', '.join(fabric.nodes)}) of "
        f"{size(memory_bytes)}, manager {fabric.manager}"
    )
    if started.launcher is None:
        out.print("[dim]kvfabric status shows it, kvfabric down ends it[/dim]", soft_wrap=True)
    else:
        out.print("[dim]Ctrl-C ends it[/dim]")
        _hold(started, folder, report=lambda text: None)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _hold(started: Up, folder: Path, report: Report) -> None:
    """Waits for Ctrl-C, or for the end of the fabric, and leaves nothing of it."""
    from kvfabric import errors
    from kvfabric.cluster import deploy

    status = None
    try:
        status = started.wait()
    except KeyboardInterrupt:
        console().print("\ngoing down")
    deploy.down(folder, report)
    if status:
        raise errors.Broken(
            f"the fabric came down by itself: {folder / deploy.LOG_NAME} says why; "
            "`kvfabric up` starts it again"
        )


def down(runtime_dir: RuntimeDir = None) -> None:
    """End the fabric that `up` started here: its processes, sockets and shared memory."""
    from kvfabric.cluster import deploy

    folder = chosen_runtime_dir(runtime_dir)
    out = console()
    with out.status("going down"):
        ended = deploy.down(folder, report=lambda text: None)
    if not ended.found:
        out.print(f"nothing runs here ({folder})")
    elif ended.killed:
        out.print(f"[yellow]down[/yellow]  {ended.killed} processes had to be killed")
    else:
        out.print("[green]down[/green]")
