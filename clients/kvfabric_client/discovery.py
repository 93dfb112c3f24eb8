"""Where a client's nodes are: on its own host first, then wherever the manager knows one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from kvfabric.errors import Refused
from kvfabric.rpc.v1 import control_pb2
from kvfabric.settings import host_id, runtime_dir

RECORD = "fabric.json"


def local_nodes() -> list[str]:
    """Addresses of the nodes on this host, in the order of their names."""
    return [f"unix:{path}" for path in sorted(runtime_dir().glob("*.sock"))]


def manager_address() -> str:
    """host:port of the gManager, or nothing where none is known."""
    if address := os.environ.get("KVFABRIC_MANAGER"):
        return address
    path: Path = runtime_dir() / RECORD
    try:
        record = json.loads(path.read_text())
        return str(record.get("manager", ""))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, AttributeError) as error:
        raise Refused(f"{path} cannot be read: {error}; run `kvfabric down` and `up`") from error


def candidates(home: str | None) -> Iterator[str]:
    """The home node first, then this host's other nodes."""
    chosen = home or os.environ.get("KVFABRIC_HOME") or ""
    if chosen:
        yield chosen
    yield from (address for address in local_nodes() if address != chosen)


def address_of(info: control_pb2.NodeInfo) -> str:
    """How to reach a node: by its socket on the same host, else over TCP. Empty: not at all."""
    endpoints = info.endpoints
    if endpoints.host == host_id() and os.path.exists(endpoints.unix_path):
        return f"unix:{endpoints.unix_path}"
    return f"tcp:{endpoints.tcp_address}" if endpoints.tcp_address else ""
