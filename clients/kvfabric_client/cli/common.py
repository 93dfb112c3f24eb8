"""What the commands share: the options that several have, tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kvfabric.types import Namespace
    from kvfabric_client.manager import Manager

RuntimeDir = Annotated[
    Path | None,
    typer.Option(
        "--runtime-dir",
        help="Where sockets and fabric.json are; else KVFABRIC_RUNTIME_DIR, else the user's own.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="As JSON on standard output.")]
Tenant = Annotated[str, typer.Option(help="The tenant whose keys are meant.")]
NamespaceText = Annotated[
    str, typer.Option(help="FINGERPRINT or FINGERPRINT:SALT, both in hex: the room of keys.")
]


def chosen_runtime_dir(option: Path | None) -> Path:
    """The directory that the option names, else the user's own; it need not be there.

    The SDK, which looks for nodes there, is told by the environment.
    """
    import os

    from kvfabric.settings import runtime_dir

    if option is not None:
        os.environ["KVFABRIC_RUNTIME_DIR"] = str(option.absolute())
    return runtime_dir()


def console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A plain table; the columns named in `right` hold numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made


def print_json(data: object) -> None:
    import json

    typer.echo(json.dumps(data, indent=2))


def print_json_line(data: object) -> None:
    """One line of JSON, for commands that tell how far they are."""
    import json

    typer.echo(json.dumps(data))


def named_namespace(text: str, tenant: str) -> Namespace:
    """What --namespace names."""
    from kvfabric.types import Namespace

    fingerprint, _, salt = text.partition(":")
    return Namespace(
        tenant,
        hex_bytes(fingerprint, "--namespace", digits=64),
        hex_bytes(salt, "--namespace") if salt else b"",
    )


def hex_bytes(text: str, option: str, digits: int | None = None) -> bytes:
    """Bytes from hex digits; a usage error of `option` for anything else."""
    try:
        data = bytes.fromhex(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not pairs of hex digits", param_hint=option
        ) from error
    if not data or (digits and len(text) != digits):
        need = f"{digits}" if digits else "at least 2"
        raise typer.BadParameter(f"{text!r} has not {need} digits", param_hint=option)
    return data


def size_bytes(text: str, option: str) -> int:
    """Bytes from words like 64MiB; nothing is 0. A usage error of `option` for anything else."""
    from kvfabric.settings import parse_size

    try:
        return parse_size(text) if text else 0
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def known_manager() -> Manager:
    """The gManager of this fabric, to be closed; Unreachable where none is known."""
    from kvfabric import errors
    from kvfabric_client import discovery
    from kvfabric_client.manager import Manager

    address = discovery.manager_address()
    if not address:
        raise errors.Unreachable(
            "no gManager is known here: `kvfabric up` starts a fabric, or KVFABRIC_MANAGER "
            "names one that runs"
        )
    return Manager(address)
