"""What is in the runtime directory: sockets, a fabric that is up, or what one left."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kvfabric_client.cli.checks.finding import Finding, Level

# A unix socket's name may have 107 bytes: the runtime directory, a slash, a node's name, .sock
SOCKET_NAME_BYTES = 107
NODE_NAME_BYTES = 20
MANAGER_DEADLINE_S = 3.0


def directory(runtime_dir: Path) -> Finding:
    name = "runtime directory"
    if len(os.fsencode(runtime_dir)) + NODE_NAME_BYTES > SOCKET_NAME_BYTES:
        remedy = "set KVFABRIC_RUNTIME_DIR to a shorter one"
        return Finding(name, Level.BROKEN, f"{runtime_dir} is too long for sockets", remedy)
    try:
        status = runtime_dir.stat()
    except FileNotFoundError:
        return Finding(name, Level.OK, f"{runtime_dir}, made at the first start")
    except OSError as error:
        return Finding(name, Level.BROKEN, str(error), "set KVFABRIC_RUNTIME_DIR to one of yours")
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.getuid():
        text = f"{runtime_dir} belongs to user {status.st_uid}"
        return Finding(name, Level.BROKEN, text, "set KVFABRIC_RUNTIME_DIR to one of yours")
    if mode & 0o077:
        text = f"{runtime_dir} is open to others ({mode:o})"
        return Finding(name, Level.BROKEN, text, f"chmod 700 {runtime_dir}")
    return Finding(name, Level.OK, str(runtime_dir))


def leftovers(runtime_dir: Path) -> Finding:
    from kvfabric.cluster import deploy, record
    from kvfabric.errors import Broken

    name = "leftovers"
    try:
        fabric = record.read(runtime_dir)
    except Broken as error:
        remedy = f"rm {record.path_of(runtime_dir)} if no fabric runs"
        return Finding(name, Level.BROKEN, str(error), remedy)
    if fabric is not None and not deploy.running(runtime_dir):
        text = f"{record.FILE_NAME} of a fabric whose processes are gone"
        return Finding(name, Level.HINT, text, "kvfabric down")
    stale = deploy.stale_sockets(runtime_dir)
    if stale:
        text = f"sockets at which nobody listens: {', '.join(path.name for path in stale)}"
        remedy = f"rm {' '.join(str(path) for path in stale)}"
        return Finding(name, Level.HINT, text, remedy)
    return Finding(name, Level.OK, "none")


def manager(_runtime_dir: Path) -> Finding:
    from kvfabric.errors import FabricError
    from kvfabric_client import discovery
    from kvfabric_client.deadline import Deadline
    from kvfabric_client.manager import Manager

    name = "gManager"
    try:
        address = discovery.manager_address()
        if not address:
            return Finding(name, Level.OK, "no fabric is up here")
        control = Manager(address)
        nodes = control.nodes(Deadline.after(MANAGER_DEADLINE_S))
        control.close()
    except FabricError as error:
        remedy = "Ray restarts it within seconds; else kvfabric down, kvfabric up"
        return Finding(name, Level.BROKEN, str(error), remedy)
    alive = sum(info.alive for info in nodes)
    return Finding(name, Level.OK, f"{address} knows {alive} living nodes")
