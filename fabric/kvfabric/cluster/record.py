"""fabric.json: what `kvfabric up` leaves in the runtime directory for clients and for `down`."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from kvfabric import errors
from kvfabric.cluster.processes import Process

FILE_NAME = "fabric.json"


@dataclass(frozen=True, slots=True)
class Fabric:
    """One fabric that `kvfabric up` started or joined."""

    manager: str  # host:port of the gManager; "" until it is known
    ray: str  # host:port of Ray's GCS; "" until it is known
    mark: str  # of this `up`'s processes; "" when it joined a Ray that others run
    scratch: str  # Ray's own directory, removed by `down`; "" when it joined
    nodes: tuple[str, ...] = ()
    processes: tuple[Process, ...] = ()  # the launcher first


def path_of(runtime_dir: Path) -> Path:
    return runtime_dir / FILE_NAME


def write(runtime_dir: Path, fabric: Fabric) -> None:
    """Replaces the file at once: a reader sees the old or the new one."""
    descriptor, name = tempfile.mkstemp(prefix=FILE_NAME, dir=runtime_dir)  # mode 0600
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(fabric), file, indent=2)
        file.write("\n")
    os.replace(name, path_of(runtime_dir))


def read(runtime_dir: Path) -> Fabric | None:
    """None where there is no file; Broken where it cannot be understood."""
    path = path_of(runtime_dir)
    try:
        data = json.loads(path.read_text())
        return Fabric(
            manager=str(data["manager"]),
            ray=str(data["ray"]),
            mark=str(data["mark"]),
            scratch=str(data["scratch"]),
            nodes=tuple(str(name) for name in data["nodes"]),
            processes=tuple(
                Process(int(process["pid"]), int(process["started_ticks"]))
                for process in data["processes"]
            ),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise errors.Broken(
            f"{path} is not what `kvfabric up` writes ({error!r}): if no fabric runs here, "
            "remove the file"
        ) from error


def remove(runtime_dir: Path) -> None:
    path_of(runtime_dir).unlink(missing_ok=True)
