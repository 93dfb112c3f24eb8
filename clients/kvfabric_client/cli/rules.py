"""`kvfabric policy` and `kvfabric pin`: rules that hold until they are taken back."""

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
    from kvfabric.rpc.v1 import control_pb2

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
    manager = known_manager()
    try:
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
    finally:
        manager.close()
    _show(found, as_json)


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
    from kvfabric.types import Key, Status
    from kvfabric_client.deadline import Deadline

    room = namespace_id(named_namespace(namespace, tenant))
    keys = [Key(hex_bytes(text, "KEY", digits=64)) for text in key]
    chosen_runtime_dir(runtime_dir)
    manager = known_manager()
    statuses: list[Status] = []
    try:
        for first in range(0, len(keys), BATCH_KEYS):
            part = keys[first : first + BATCH_KEYS]
            deadline = Deadline.after(CALL_DEADLINE_S)
            statuses += manager.pin(room, part, deadline, unpin=unpin)
    finally:
        manager.close()
    held = statuses.count(Status.OK)
    if as_json:
        print_json({"keys": len(keys), "held": held, "pinned": not unpin})
        return
    what = "no longer pinned" if unpin else "pinned"
    console().print(f"{len(keys):,} keys are {what}, of which nodes hold {held:,} now")


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
