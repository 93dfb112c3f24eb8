"""`kvfabric explain` and `kvfabric purge`: what became of a key, and the end of some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kvfabric_client.cli.common import (
    Json,
    NamespaceText,
    RuntimeDir,
    Tenant,
    chosen_runtime_dir,
    console,
    hex_bytes,
    named_namespace,
    print_json,
    table,
)
from kvfabric_client.texts import duration, size

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfabric.rpc.v1 import types_pb2
    from kvfabric.types import Key, Namespace
    from kvfabric_client import Client
    from kvfabric_client.link import Link

CALL_DEADLINE_S = 5.0
PURGE_DEADLINE_S = 60.0
Answer = TypeVar("Answer")


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
    prefix = hex_bytes(key, "KEY")
    events: list[types_pb2.Event] = []
    places: list[str] = []
    wanted: list[int] = []
    silent: list[str] = []
    with Client(tenant=tenant, timeout_s=CALL_DEADLINE_S) as fabric:
        addresses = _nodes(fabric, silent)
        try:
            answer = fabric.manager().explain(b"", prefix, Deadline.after(CALL_DEADLINE_S))
            events.extend(answer.events)
            places = [node for place in answer.places for node in place.nodes]
            wanted = sorted(set(answer.replicas))
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
                "replicas": wanted,
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
        rows.add_row(duration(event.age_ms / 1000), event.node or "gManager", event.what, event.why)
    out.print(rows)
    out.print(_held(sorted(set(places)), wanted))


def _held(nodes: list[str], wanted: list[int]) -> str:
    if not nodes:
        return "held by no node now"
    counts = f"; replicas wanted: {', '.join(map(str, wanted))}" if wanted else ""
    return f"held by {', '.join(nodes)}{counts}"


def purge(
    namespace: NamespaceText,
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
    room = named_namespace(namespace, tenant)
    keys = [Key(hex_bytes(text, "--key", digits=64)) for text in key or ()]
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
