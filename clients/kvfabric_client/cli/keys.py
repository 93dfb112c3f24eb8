"""`kvfabric explain` and `kvfabric purge`: what became of a key, and the end of some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kvfabric_client.cli.common import (
    Json,
    RuntimeDir,
    chosen_runtime_dir,
    console,
    duration,
    print_json,
    size,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfabric.rpc.v1 import types_pb2
    from kvfabric.types import Key, Namespace
    from kvfabric_client import Client
    from kvfabric_client.link import Link

CALL_DEADLINE_S = 5.0
PURGE_DEADLINE_S = 60.0
Answer = TypeVar("Answer")

Tenant = Annotated[str, typer.Option(help="The tenant whose keys are meant.")]


def explain(
    key: Annotated[str, typer.Argument(help="The key in hex, or its first digits.")],
    tenant: Tenant = "default",
    runtime_dir: RuntimeDir = None,
    as_json: Json = False,
) -> None:
    """Tell what became of a key, in the order of time, and why.

    Asks the gManager and every node. They remember their latest decisions, not all.
    """
    from kvfabric.errors import FabricError
    from kvfabric_client.client import Client
    from kvfabric_client.deadline import Deadline

    chosen_runtime_dir(runtime_dir)
    prefix = _hex(key, "KEY")
    events: list[types_pb2.Event] = []
    places: list[str] = []
    silent: list[str] = []
    with Client(tenant=tenant, timeout_s=CALL_DEADLINE_S) as fabric:
        addresses = _nodes(fabric, silent)
        try:
            answer = fabric.manager().explain(b"", prefix, Deadline.after(CALL_DEADLINE_S))
            events.extend(answer.events)
            places = [node for place in answer.places for node in place.nodes]
        except FabricError as error:
            silent.append(str(error))
        for address in addresses:
            try:
                events.extend(_at(fabric, address, _told(prefix)))
            except FabricError as error:
                silent.append(str(error))
    events.sort(key=lambda event: -event.age_ms)
    if as_json:
        print_json(
            {
                "key": key,
                "nodes": sorted(set(places)),
                "events": [
                    {"age_s": e.age_ms / 1000, "node": e.node, "what": e.what, "why": e.why}
                    for e in events
                ],
                "silent": silent,
            }
        )
        return
    out = console()
    for line in silent:
        out.print(f"[yellow]not asked: {line}[/yellow]")
    if not events:
        out.print(f"nobody remembers a key that begins with {key}")
        return
    rows = table("ago", "node", "what", "why", right=("ago",))
    for event in events:
        rows.add_row(duration(event.age_ms / 1000), event.node, event.what, event.why)
    out.print(rows)
    out.print(f"held by {', '.join(sorted(set(places)))}" if places else "held by no node now")


def purge(
    namespace: Annotated[
        str, typer.Option(help="FINGERPRINT or FINGERPRINT:SALT, both in hex: the room of keys.")
    ],
    key: Annotated[
        list[str] | None,
        typer.Option(help="Only this key, in hex, and all that continues it; repeatable."),
    ] = None,
    owner: Annotated[str, typer.Option(help="Only what this principal stored.")] = "",
    tenant: Tenant = "default",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Erase shards on every node: of a namespace, of keys, or of an owner in it."""
    from kvfabric import errors
    from kvfabric.types import Key
    from kvfabric_client.client import Client

    chosen_runtime_dir(runtime_dir)
    room = _namespace(namespace, tenant)
    keys = [Key(_hex(text, "--key", digits=64)) for text in key or ()]
    what = f"{len(keys)} keys and what continues them" if keys else "the whole namespace"
    if not yes:
        of = f" that {owner} stored" if owner else ""
        typer.confirm(f"Erase {what}{of}, on every node?", abort=True)
    silent: list[str] = []
    shards = size_bytes = 0
    with Client(tenant=tenant, timeout_s=PURGE_DEADLINE_S) as fabric:
        addresses = _nodes(fabric, silent)
        for address in addresses:
            try:
                erased = _at(fabric, address, _purged(room, keys, owner))
            except errors.Retry as error:
                silent.append(str(error))
                continue
            shards, size_bytes = shards + erased[0], size_bytes + erased[1]
    console().print(f"erased {shards:,} shards, {size(size_bytes)}")
    if silent or not addresses:
        raise errors.Retry(
            f"not every node was reached ({'; '.join(silent) or 'none is known'}): "
            "`kvfabric status` shows them; run this again when they answer"
        )


def _nodes(fabric: Client, silent: list[str]) -> list[str]:
    """Addresses of all nodes; without the gManager only this host's, and that is noted."""
    from kvfabric.errors import FabricError
    from kvfabric_client import discovery

    try:
        infos = fabric.nodes()
    except FabricError as error:
        silent.append(str(error))
        return discovery.local_nodes()
    silent.extend(f"node {info.node} is silent" for info in infos if not info.alive)
    addresses = (discovery.address_of(info) for info in infos if info.alive)
    return [address for address in addresses if address]


def _at(fabric: Client, address: str, call: Callable[[Link, float], Answer]) -> Answer:
    deadline = fabric.deadline(None)
    return fabric.at(address, lambda link: call(link, deadline.at_s), deadline)


def _told(prefix: bytes) -> Callable[[Link, float], list[types_pb2.Event]]:
    from kvfabric.rpc.v1 import node_pb2

    def call(link: Link, at_s: float) -> list[types_pb2.Event]:
        answer = link.call("explain", node_pb2.ExplainRequest(key=prefix), at_s)
        return list(answer.explain_response.events)

    return call


def _purged(
    room: Namespace, keys: list[Key], owner: str
) -> Callable[[Link, float], tuple[int, int]]:
    from kvfabric.keys import namespace_id
    from kvfabric.rpc.v1 import node_pb2

    room_id = namespace_id(room)
    request = node_pb2.PurgeRequest(namespace_id=room_id, keys=keys, owner=owner)

    def call(link: Link, at_s: float) -> tuple[int, int]:
        link.open(room, room_id, at_s)
        answer = link.call("purge", request, at_s).purge_response
        return answer.shards, answer.size_bytes

    return call


def _namespace(text: str, tenant: str) -> Namespace:
    from kvfabric.types import Namespace

    fingerprint, _, salt = text.partition(":")
    return Namespace(
        tenant,
        _hex(fingerprint, "--namespace", digits=64),
        _hex(salt, "--namespace") if salt else b"",
    )


def _hex(text: str, option: str, digits: int | None = None) -> bytes:
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
