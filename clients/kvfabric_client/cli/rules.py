"""`kvfabric policy`, `replicas` and `pin`: rules that hold until they are taken back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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
    table,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfabric.rpc.v1 import control_pb2
    from kvfabric.types import Key, Status
    from kvfabric_client.deadline import Deadline

CALL_DEADLINE_S = 30.0  # every pin is written down for itself
BATCH_KEYS = 1024
MAX_REPLICAS = 16


def policy(
    namespace: NamespaceText = "",
    replicas: Annotated[
        int | None, typer.Option(min=1, max=MAX_REPLICAS, help="Replicas of each shard.")
    ] = None,
    hot: Annotated[
        int | None,
        typer.Option(
            min=0, max=MAX_REPLICAS, help="Further ones at most, of shards that are read much."
        ),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the policy back.")] = False,
    tenant: Tenant = "default",
    runtime_dir: RuntimeDir = None,
    as_json: Json = False,
) -> None:
    """Set how many replicas shards have, or show what is set.

    Without --namespace the default is meant, for all that have no policy of their own.
    """
    from kvfabric.keys import namespace_id
    from kvfabric.rpc.v1 import control_pb2
    from kvfabric_client.deadline import Deadline

    room = namespace_id(named_namespace(namespace, tenant)) if namespace else b""
    chosen_runtime_dir(runtime_dir)
    with known_manager() as manager:
        found = manager.policies(Deadline.after(CALL_DEADLINE_S))
        if remove or replicas is not None or hot is not None:
            old = next((each for each in found if each.namespace_id == room), None)
            wanted = control_pb2.Policy(
                namespace_id=room,
                replicas=replicas if replicas is not None else (old.replicas if old else 0),
                hot_replicas=hot if hot is not None else (old.hot_replicas if old else 0),
            )
            manager.set_policy(wanted, Deadline.after(CALL_DEADLINE_S), remove=remove)
            found = manager.policies(Deadline.after(CALL_DEADLINE_S))
    _show(found, as_json)


def replicas(
    key: Annotated[list[str] | None, typer.Argument(help="Keys in hex.")] = None,
    namespace: NamespaceText = "",
    count: Annotated[
        int | None, typer.Option(min=1, max=MAX_REPLICAS, help="Replicas of each of the keys.")
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Take their counts back: the policy rules again.")
    ] = False,
    tenant: Tenant = "default",
    runtime_dir: RuntimeDir = None,
    as_json: Json = False,
) -> None:
    """Set how many replicas single shards have, or show what is set.

    More than their namespace's policy wants, or fewer. It holds until --remove, over restarts
    too, and for a key that no node holds now as soon as it comes.
    """
    from kvfabric.keys import namespace_id
    from kvfabric_client.deadline import Deadline

    keys = _keys(key or [])
    if (count is not None) + remove != bool(keys):
        raise typer.BadParameter("keys need --count or --remove, and these need keys")
    if not keys:
        chosen_runtime_dir(runtime_dir)
        with known_manager() as manager:
            _show_replicas(manager.replicas(Deadline.after(CALL_DEADLINE_S)), as_json)
        return
    room, wanted = namespace_id(named_namespace(namespace, tenant)), count or 0
    chosen_runtime_dir(runtime_dir)
    with known_manager() as manager:
        held = _told(keys, lambda part, until: manager.set_replicas(room, part, wanted, until))
    if as_json:
        print_json({"keys": len(keys), "held": held, "replicas": wanted})
        return
    what = f"{wanted:,} replicas are wanted" if wanted else "the policy rules again"
    console().print(f"{what} of {len(keys):,} keys, of which nodes hold {held:,} now")


def pin(
    key: Annotated[list[str], typer.Argument(help="Keys in hex.")],
    namespace: NamespaceText,
    unpin: Annotated[bool, typer.Option("--unpin", help="Let them go instead.")] = False,
    tenant: Tenant = "default",
    runtime_dir: RuntimeDir = None,
    as_json: Json = False,
) -> None:
    """Pin keys over the whole fabric: no replica of theirs is evicted, wherever it is.

    It holds until --unpin, over restarts too. A key that no node holds now is pinned when it
    comes.
    """
    from kvfabric.keys import namespace_id

    room = namespace_id(named_namespace(namespace, tenant))
    keys = _keys(key)
    chosen_runtime_dir(runtime_dir)
    with known_manager() as manager:
        held = _told(keys, lambda part, until: manager.pin(room, part, until, unpin=unpin))
    if as_json:
        print_json({"keys": len(keys), "held": held, "pinned": not unpin})
        return
    what = "no longer pinned" if unpin else "pinned"
    console().print(f"{len(keys):,} keys are {what}, of which nodes hold {held:,} now")


def _keys(texts: list[str]) -> list[Key]:
    from kvfabric.types import Key

    return [Key(hex_bytes(text, "KEY", digits=64)) for text in texts]


def _told(keys: list[Key], tell: Callable[[list[Key], Deadline], list[Status]]) -> int:
    """Tells the manager of the keys, in parts. Returns how many some node holds."""
    from kvfabric.types import Status
    from kvfabric_client.deadline import Deadline

    statuses: list[Status] = []
    for first in range(0, len(keys), BATCH_KEYS):
        statuses += tell(keys[first : first + BATCH_KEYS], Deadline.after(CALL_DEADLINE_S))
    return statuses.count(Status.OK)


def _show_replicas(counts: list[control_pb2.ShardReplicas], as_json: bool) -> None:
    from kvfabric.types import DIGEST_BYTES

    told = [
        (each.namespace_id.hex(), each.keys[at : at + DIGEST_BYTES].hex(), each.replicas)
        for each in counts
        for at in range(0, len(each.keys), DIGEST_BYTES)
    ]
    if as_json:
        names = ("namespace_id", "key", "replicas")
        print_json([dict(zip(names, each, strict=True)) for each in told])
        return
    rows = table("namespace id", "key", "replicas", right=("replicas",))
    for namespace, key, replicas in told:
        rows.add_row(namespace, key, str(replicas))
    console().print(rows if told else "no shard has a count of its own: policies rule")


def _show(policies: list[control_pb2.Policy], as_json: bool) -> None:
    if as_json:
        print_json(
            [
                {
                    "namespace_id": each.namespace_id.hex(),
                    "replicas": each.replicas,
                    "hot_replicas": each.hot_replicas,
                }
                for each in policies
            ]
        )
        return
    rows = table("namespace id", "replicas", "hot", right=("replicas", "hot"))
    for each in policies:
        rows.add_row(
            each.namespace_id.hex() or "all others",
            str(each.replicas or "as the others"),
            f"+{each.hot_replicas}",
        )
    console().print(rows if policies else "no policy is set: every shard has one replica")
