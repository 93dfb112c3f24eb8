"""The rManager as a Ray actor: a node that Ray keeps alive on its memory node.

The actor is a plain class that owns a `Node`; the node works in threads of its own, so that
clients and peers talk to it directly and nothing of theirs passes through Ray.
"""

from __future__ import annotations

import json
from pathlib import Path

import ray
import structlog

from kvfabric import logs
from kvfabric.errors import FabricError
from kvfabric.settings import make_runtime_dir, runtime_dir
from kvfabric_nodes.node import Node
from kvfabric_nodes.settings import NodeSettings

log = structlog.get_logger(__name__)

LISTENERS = ("tcp", "grpc", "metrics")


class NodeActor:
    """Serves the node `name` for as long as the actor lives. All methods can be repeated.

    It listens on the Ray node's own address. Started again, by Ray, it serves under the same
    name, socket and, if nobody else took them meanwhile, ports.
    """

    def __init__(self, name: str, manager: str, memory_bytes: int, directory: str = "") -> None:
        logs.configure()
        self._name = name
        host = ray.util.get_node_ip_address()
        folder = make_runtime_dir(Path(directory) if directory else runtime_dir())
        settings = NodeSettings(
            node=name,
            memory=memory_bytes,
            runtime_dir=folder,
            manager=manager,
            **dict.fromkeys(LISTENERS, f"{host}:0"),
        )
        remembered = folder / f"{name}.ports"
        self._node = _started(settings, host, remembered)

    @ray.method
    def name(self) -> str:
        return self._name

    @ray.method
    def stop(self) -> None:
        self._node.stop()


def _started(settings: NodeSettings, host: str, remembered: Path) -> Node:
    """A serving node: on the ports of its last start, else on free ones, which are noted."""
    node = None
    ports = _read(remembered)
    if ports:
        addresses = {listener: f"{host}:{ports[listener]}" for listener in ports}
        node = Node(settings.model_copy(update=addresses))
        try:
            node.start()
        except FabricError as error:
            log.warning("ports_taken", why=str(error), effect="the node takes others")
            node = None
    if node is None:
        node = Node(settings)
        node.start()
    endpoints = node.endpoints
    addresses = {
        "tcp": endpoints.tcp_address,
        "grpc": endpoints.grpc_address,
        "metrics": endpoints.metrics_address,
    }
    ports = {name: int(address.rpartition(":")[2]) for name, address in addresses.items()}
    remembered.write_text(json.dumps(ports))
    return node


def _read(path: Path) -> dict[str, int]:
    try:
        ports = json.loads(path.read_text())
        return {listener: int(ports[listener]) for listener in LISTENERS}
    except (OSError, ValueError, KeyError, TypeError):  # the first start, or an unreadable note
        return {}
