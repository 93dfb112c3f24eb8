"""`kvfabric migrate`, `drain` and `moves`: shards that go elsewhere while they are in use."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvfabric_client.cli.common import (
    Json,
    NamespaceText,
    RuntimeDir,
    Tenant,
    chosen_runtime_dir,
    console,
    hex_bytes,
    known_manager,
    named_namespace,
    print_json,
    print_json_line,
    size_bytes,
    table,
)
from kvfabric_client.texts import duration, size

if TYPE_CHECKING:
    from rich.progress import Progress

    from kvfabric.rpc.v1 import control_pb2
    from kvfabric_client.manager import Manager

CALL_DEADLINE_S = 5.0
POLL_S = 0.25
WAITING = 3  # exit status: not finished when the time was up

Rate = Annotated[str, typer.Option(help="Bytes per second at most, as 100MiB; else unthrottled.")]
Timeout = Annotated[
    float, typer.Option(min=0, help="Seconds to wait; then it goes on without us, and we exit 3.")
]


def migrate(
    key: Annotated[
        list[str] | None, typer.Argument(help="Keys in hex; none: all that --from holds.")
    ] = None,
    namespace: NamespaceText = "",
    source: Annotated[
        str, typer.Option("--from", help="The node to move from; else wherever the keys lie.")
    ] = "",
    to: Annotated[str, typer.Option(help="The node to move to; else the best for each.")] = "",
    rate: Rate = "",
    copy: Annotated[bool, typer.Option("--copy", help="Keep what --from has.")] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Do not wait for its end.")
    ] = False,
    timeout: Timeout = 3600.0,
    tenant: Tenant = "default",
    runtime_dir: RuntimeDir = None,
    as_json: Json = False,
) -> None:
    """Move shards between nodes. Readers and writers go on meanwhile.

    Exits with 0 when all is moved, 1 when some could not be, 3 when the time was up.
    """
    from kvfabric.keys import namespace_id
    from kvfabric.rpc.v1 import control_pb2
    from kvfabric_client.deadline import Deadline

    if key and not namespace:
        raise typer.BadParameter("keys are nothing without it", param_hint="--namespace")
    if not key and not source:
        raise typer.BadParameter("name keys, or a node to move from", param_hint="--from")
    request = control_pb2.MigrateRequest(
        namespace_id=namespace_id(named_namespace(namespace, tenant)) if namespace else b"",
        keys=[hex_bytes(text, "KEY", digits=64) for text in key or ()],
        source=source,
        destination=to,
        bytes_per_s=size_bytes(rate, "--rate"),
        copy=copy,
    )
    chosen_runtime_dir(runtime_dir)
    with known_manager() as manager:
        begun = manager.migrate(request, Deadline.after(CALL_DEADLINE_S))
        if detach:
            _begun(begun, as_json)
            return
        move = _watch_move(manager, begun.move, timeout, as_json)
    _tell_end(move, as_json)


def drain(
    node: Annotated[str, typer.Argument(help="The node to be emptied, by its name.")],
    rate: Rate = "",
    timeout: Timeout = 3600.0,
    cancel: Annotated[bool, typer.Option("--cancel", help="Let the node serve again.")] = False,
    runtime_dir: RuntimeDir = None,
    as_json: Json = False,
) -> None:
    """Empty a node while it serves; it may be deleted when this exits with 0.

    Shards move to other nodes, loans and sequences too, and leases are waited for. Exits
    with 3 when the time was up: the node is emptied on, and the same command goes on waiting.
    """
    from kvfabric import errors
    from kvfabric_client.deadline import Deadline

    bytes_per_s = size_bytes(rate, "--rate")
    chosen_runtime_dir(runtime_dir)
    with known_manager() as manager:
        if cancel:
            manager.drain(node, Deadline.after(CALL_DEADLINE_S), cancel=True)
            if as_json:
                print_json_line({"node": node, "cancelled": True})
            else:
                console().print(f"{node} serves again")
            return
        told = _watch_drain(manager, node, bytes_per_s, timeout, as_json)
    if told is None:
        raise errors.Unreachable(
            f"the gManager {manager.address} did not answer within {timeout:.0f} s: it is not "
            f"known whether {node} is empty; try again"
        )
    if not told.empty:
        if not as_json:
            console().print(
                f"[yellow]{node} is not empty yet[/yellow]: it waits for {told.waiting}"
            )
        raise typer.Exit(WAITING)
    if not as_json:
        console().print(
            f"[green]{node} is empty[/green] ({told.moved_shards:,} shards went) and may be deleted"
        )


def moves(
    cancel: Annotated[
        int, typer.Option(min=0, help="End the move of this number; its copies stay as cache.")
    ] = 0,
    runtime_dir: RuntimeDir = None,
    as_json: Json = False,
) -> None:
    """Show the moves that are under way or ended lately."""
    from kvfabric_client.deadline import Deadline

    chosen_runtime_dir(runtime_dir)
    with known_manager() as manager:
        if cancel:
            manager.cancel_move(cancel, Deadline.after(CALL_DEADLINE_S))
        found = manager.moves(Deadline.after(CALL_DEADLINE_S))
    if as_json:
        print_json([_view(move) for move in found])
        return
    right = ("move", "shards", "size", "age")
    rows = table("move", "kind", "from", "to", "state", "shards", "size", "age", "why", right=right)
    for move in found:
        rows.add_row(
            str(move.move),
            move.kind,
            move.source or "any",
            move.destination or "any",
            _state(move),
            f"{move.copied:,}/{move.keys:,}",
            size(move.size_bytes),
            duration(move.age_ms / 1000),
            move.why,
        )
    console().print(rows if found else "nothing moves, and nothing did lately")


# Waiting


def _watch_move(
    manager: Manager, number: int, timeout_s: float, as_json: bool
) -> control_pb2.Move | None:
    """The move at its end, or when the time was up; None where its manager forgot it."""
    from kvfabric.errors import Retry
    from kvfabric.rpc.v1 import control_pb2
    from kvfabric_client.deadline import Deadline

    under_way = (control_pb2.MOVE_STATE_COPYING, control_pb2.MOVE_STATE_DROPPING)
    end_s = time.monotonic() + timeout_s
    with _progress(as_json) as bar:
        task = bar.add_task(f"move {number}", total=None)
        while True:
            try:
                found = manager.moves(Deadline.after(CALL_DEADLINE_S), number)
            except Retry:  # the gManager is being started anew: it may be there in a moment
                found = None
            if found == []:
                return None
            if found:
                (move,) = found
                bar.update(task, total=2 * move.keys, completed=move.copied + move.dropped)
                if as_json:
                    print_json_line(_view(move))
                if move.state not in under_way or time.monotonic() >= end_s:
                    return move
            elif time.monotonic() >= end_s:
                return None
            time.sleep(POLL_S)


def _watch_drain(
    manager: Manager, node: str, bytes_per_s: int, timeout_s: float, as_json: bool
) -> control_pb2.DrainResponse | None:
    """What was told last: that it is empty, or when the time was up; None: nothing was."""
    from kvfabric.errors import Retry
    from kvfabric_client.deadline import Deadline

    end_s = time.monotonic() + timeout_s
    told: control_pb2.DrainResponse | None = None
    with _progress(as_json) as bar:
        task = bar.add_task(node, total=None)
        while True:
            try:
                answer = manager.drain(
                    node, Deadline.after(CALL_DEADLINE_S), bytes_per_s=bytes_per_s
                )
            except Retry as error:  # it is being started anew: this must outlast that
                bar.update(task, description=f"{node}: the gManager is away")
                if as_json:
                    print_json_line({"node": node, "empty": False, "away": str(error)})
            else:
                if as_json and answer != told:
                    print_json_line(_drained(node, answer))
                told = answer
                bar.update(
                    task,
                    description=f"{node}: {answer.waiting}" if answer.waiting else node,
                    total=answer.moved_shards + answer.left_shards,
                    completed=answer.moved_shards,
                )
                if answer.empty:
                    return answer
            if time.monotonic() >= end_s:
                return told
            time.sleep(POLL_S)


def _progress(as_json: bool) -> Progress:
    """A bar on standard error, so that standard output is the result's alone."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
        disable=as_json,
    )


# Telling


def _begun(begun: control_pb2.MigrateResponse, as_json: bool) -> None:
    if as_json:
        print_json_line({"move": begun.move, "keys": begun.keys})
    else:
        console().print(f"move {begun.move} of {begun.keys:,} shards; kvfabric moves shows it")


def _tell_end(move: control_pb2.Move | None, as_json: bool) -> None:
    """The last word, and the exit status."""
    from kvfabric import errors
    from kvfabric.rpc.v1 import control_pb2

    if move is None:
        raise errors.Retry(
            "the gManager was started anew and knows nothing of the move; what was copied "
            "stays; run this again for the rest"
        )
    if move.state == control_pb2.MOVE_STATE_DONE:
        if not as_json:
            console().print(
                f"[green]done[/green]  {move.copied:,} shards copied, {move.dropped:,} dropped, "
                f"about {size(move.size_bytes)}"
            )
        return
    under_way = move.state in (control_pb2.MOVE_STATE_COPYING, control_pb2.MOVE_STATE_DROPPING)
    if not as_json:
        console().print(
            f"[yellow]{_state(move)}[/yellow]  {move.copied:,} of {move.keys:,} shards copied"
            + (f": {move.why}" if move.why else "")
        )
    raise typer.Exit(WAITING if under_way else 1)


def _state(move: control_pb2.Move) -> str:
    from kvfabric.rpc.v1 import control_pb2

    return control_pb2.MoveState.Name(move.state).removeprefix("MOVE_STATE_").lower()


def _view(move: control_pb2.Move) -> dict[str, Any]:
    return {
        "move": move.move,
        "kind": move.kind,
        "from": move.source,
        "to": move.destination,
        "state": _state(move),
        "shards": move.keys,
        "copied": move.copied,
        "dropped": move.dropped,
        "size_bytes": move.size_bytes,
        "age_s": move.age_ms / 1000,
        "why": move.why,
    }


def _drained(node: str, told: control_pb2.DrainResponse) -> dict[str, Any]:
    return {
        "node": node,
        "empty": told.empty,
        "left_shards": told.left_shards,
        "left_bytes": told.left_bytes,
        "moved_shards": told.moved_shards,
        "lent_bytes": told.lent_bytes,
        "borrowed_bytes": told.borrowed_bytes,
        "waiting": told.waiting,
    }
