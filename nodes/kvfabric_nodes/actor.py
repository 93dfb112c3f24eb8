"""The rManager as a Ray actor: a node that Ray keeps alive on its memory node.

The actor is a plain class that owns a `Node`; the node works in threads of its own, so that
clients and peers talk to it directly and nothing of theirs passes through Ray.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import ray
import structlog
from pydantic import ValidationError

from kvfabric import logs
from kvfabric.errors import FabricError, Refused
from kvfabric.settings import make_runtime_dir, runtime_dir
from kvfabric_nodes.node import Node, own_process
from kvfabric_nodes.settings import NodeSettings

log = structlog.get_logger(__name__)

LISTENERS = ("tcp", "grpc", "metrics")


class NodeActor:
    """Serves the node `name` for as long as the actor lives. All methods can be repeated.

    It listens on the Ray node's own address. Started again by Ray it serves under the same
    name and socket, and on the same ports if nobody took them meanwhile. If the node ends by
    itself the process ends with it, so that Ray starts another.
    """

    def __init__(self, name: str, manager: str, memory_bytes: int, directory: str = "") -> None:
        logs.configure()
        own_process()
        folder = make_runtime_dir(Path(directory) if directory else runtime_dir())
        given: dict[str, Any] = {
            "node": name,
            "memory": memory_bytes,
            "runtime_dir": folder,
            "manager": manager,
        }
        try:
            self._node = _started(given, ray.util.get_node_ip_address(), folder / f"{name}.ports")
        except ValidationError as error:
            reasons = "; ".join(
                detail["msg"].removeprefix("Value error, ") for detail in error.errors()
            )
            raise Refused(f"node {name}: {reasons}") from error
        self._stopping = False
        threading.Thread(target=self._end_with_node, name="kvfabric-watch", daemon=True).start()

    @ray.method
    def name(self) -> str:
        return self._node.settings.node

    @ray.method
    def stop(self) -> None:
        self._stopping = True
        self._node.stop()

    def _end_with_node(self) -> None:
        self._node.wait()
        if not self._stopping:
            os._exit(1)


def _started(given: dict[str, Any], host: str, remembered: Path) -> Node:
    """A serving node: on the ports of its last start, else on free ones, which are noted."""
    ports = _read(remembered)
    if ports:
        try:
            return _start(given, host, ports)
        except FabricError as error:
            log.warning("ports_taken", why=str(error), effect="the node takes others")
    node = _start(given, host, dict.fromkeys(LISTENERS, 0))
    ports = {
        name: int(getattr(node.endpoints, f"{name}_address").rpartition(":")[2])
        for name in LISTENERS
    }
    remembered.write_text(json.dumps(ports))
    return node


def _start(given: dict[str, Any], host: str, ports: dict[str, int]) -> Node:
    addresses: dict[str, Any] = {name: f"{host}:{ports[name]}" for name in LISTENERS}
    settings = NodeSettings(**given, **addresses)
    node = Node(settings, keeper=settings.keeper)
    node.start()
    return node


def _read(path: Path) -> dict[str, int]:
    try:
        ports = json.loads(path.read_text())
        return {name: int(ports[name]) for name in LISTENERS}
    except (OSError, ValueError, KeyError, TypeError):  # the first start, or a torn note
        return {}
