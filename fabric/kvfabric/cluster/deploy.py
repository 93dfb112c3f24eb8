"""`kvfabric up` and `kvfabric down` without their words to the user: no Ray is imported here."""

from __future__ import annotations

import fcntl
import importlib.util
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from kvfabric import errors
from kvfabric.cluster import keepers, processes, record
from kvfabric.cluster.plan import JoinPlan, LeavePlan, LocalPlan
from kvfabric.cluster.spawn import (
    LOG_NAME,
    TOKEN_NAME,
    Report,
    follow,
    launch,
    ray_environment,
    visit,
)

__all__ = [
    "LOG_NAME",
    "TOKEN_NAME",
    "Down",
    "Report",
    "Up",
    "down",
    "running",
    "stale_sockets",
    "up_joined",
    "up_local",
]

LOCK_NAME = "up.lock"
# The launcher's own order: actors, Ray's nodes, the head. Measured: 1 to 3 s for two nodes.
DOWN_DEADLINE_S = 20.0
GRACE_S = 5.0  # between SIGTERM and SIGKILL for whatever is left
KILL_S = 5.0  # from SIGKILL until it must be gone
PROBE_S = 0.2


@dataclass(frozen=True, slots=True)
class Up:
    """A fabric that is up. In the foreground, `wait` returns when its launcher has ended."""

    fabric: record.Fabric
    launcher: subprocess.Popen[str] | None

    def wait(self) -> int:
        return self.launcher.wait() if self.launcher else 0


@dataclass(frozen=True, slots=True)
class Down:
    """What `down` found: a fabric or none, and how many processes had to be killed."""

    found: bool
    killed: int = 0


def up_local(
    runtime_dir: Path,
    *,
    nodes: int,
    memory_bytes: int,
    manager_port: int = 0,
    attached: bool = False,
    report: Report,
) -> Up:
    """Starts a Ray and a fabric of `nodes` memory nodes on this machine.

    Attached, it goes down when this process ends, however that ends; else it stays. Raises
    Conflict when one is up already, and whatever kept it from starting; then nothing of it
    is left.
    """
    _need_ray()
    with _locked(runtime_dir):
        _refuse_second(runtime_dir)
        mark = secrets.token_hex(8)
        # Ray's socket names are long, and may have 107 bytes in all: so not in the runtime dir.
        scratch = tempfile.mkdtemp(prefix="kvfabric-", dir="/tmp")
        plan = LocalPlan(
            runtime_dir=str(runtime_dir),
            mark=mark,
            scratch=scratch,
            nodes=nodes,
            memory_bytes=memory_bytes,
            manager_port=manager_port,
            attached=attached,
        )
        started = record.Fabric(manager="", ray="", mark=mark, scratch=scratch)
        record.write(runtime_dir, started)  # first, so that a `down` after a crash has the mark
        environment = ray_environment(runtime_dir, mark)
        launcher = launch(plan, runtime_dir, environment, attached=attached)
        try:
            itself = processes.of(launcher.pid)
            started = replace(started, processes=(itself,) if itself else ())
            record.write(runtime_dir, started)
            follow(launcher, runtime_dir, report)
        except BaseException:
            _end_local(runtime_dir, started)
            launcher.wait()
            raise
    return Up(_recorded(runtime_dir), launcher if attached else None)


def up_joined(
    runtime_dir: Path,
    *,
    address: str,
    nodes: int,
    memory_bytes: int,
    manager_port: int,
    report: Report,
) -> Up:
    """Starts a fabric in the Ray at `address`: an rManager on every node with our resource.

    `nodes` is how many to wait for; 0 for those that are there now. Ray's settings, such as
    RAY_AUTH_MODE and its token, are taken from the environment: they must be that Ray's.
    """
    _need_ray()
    with _locked(runtime_dir):
        _refuse_second(runtime_dir)
        plan = JoinPlan(
            runtime_dir=str(runtime_dir),
            address=address,
            nodes=nodes,
            memory_bytes=memory_bytes,
            manager_port=manager_port,
        )
        visit(plan, runtime_dir, report)
    return Up(_recorded(runtime_dir), None)


def down(runtime_dir: Path, report: Report) -> Down:
    """Ends what `up` started here, in order and within deadlines; safe to repeat.

    Raises Broken if a process survives SIGKILL, and then leaves the record.
    """
    if not runtime_dir.is_dir():
        return Down(found=False)
    with _locked(runtime_dir):
        fabric = record.read(runtime_dir)
        if fabric is None:
            return Down(found=False)
        if fabric.mark:
            return Down(found=True, killed=_end_local(runtime_dir, fabric))
        visit(LeavePlan(fabric.ray), runtime_dir, report)
        keepers.end(runtime_dir, fabric.nodes, time.monotonic() + GRACE_S)
        _clean(runtime_dir)
        return Down(found=True)


def running(runtime_dir: Path) -> bool:
    """Whether a fabric is up here, as far as this machine alone can tell."""
    fabric = record.read(runtime_dir)
    return fabric is not None and (not fabric.mark or bool(processes.marked(fabric.mark)))


def stale_sockets(runtime_dir: Path) -> list[Path]:
    """Sockets in the runtime directory at which nobody listens."""
    paths = [*sorted(runtime_dir.glob("*.sock")), *keepers.sockets(runtime_dir)]
    return [path for path in paths if _nobody_listens(path)]


def _need_ray() -> None:
    missing = [name for name in ("ray", "kvfabric_nodes") if importlib.util.find_spec(name) is None]
    if missing:
        raise errors.Unsupported(
            f"{' and '.join(missing)} not installed here: pip install 'kvfabric[node]'"
        )


def _refuse_second(runtime_dir: Path) -> None:
    fabric = record.read(runtime_dir)
    if fabric is None:
        return
    if running(runtime_dir):
        raise errors.Conflict(
            f"a fabric is up already (manager {fabric.manager or 'not yet there'}, "
            f"{len(fabric.nodes)} nodes): `kvfabric status` shows it, `kvfabric down` ends it"
        )
    _clean(runtime_dir, fabric.scratch)  # the machine was restarted, or everything was killed


def _recorded(runtime_dir: Path) -> record.Fabric:
    fabric = record.read(runtime_dir)
    assert fabric is not None  # the launcher wrote it before it said that it is ready
    return fabric


def _end_local(runtime_dir: Path, fabric: record.Fabric) -> int:
    """Ends all processes of that `up` and removes what they left; says how many were killed."""
    mark = fabric.mark
    for launcher in fabric.processes[:1]:
        if processes.signal_one(launcher, mark, signal.SIGTERM):
            processes.wait(launcher, time.monotonic() + DOWN_DEADLINE_S)
    killed, rest = processes.end(mark, grace_s=GRACE_S, kill_s=KILL_S)
    if rest:
        raise errors.Broken(
            f"processes {[process.pid for process in rest]} do not end, not even killed: they "
            "wait in the kernel (see /proc/PID/stack); run `kvfabric down` again when they are gone"
        )
    _clean(runtime_dir, fabric.scratch)
    return killed


def _clean(runtime_dir: Path, scratch: str = "") -> None:
    for path in (*stale_sockets(runtime_dir), *runtime_dir.glob("*.ports")):
        path.unlink(missing_ok=True)
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    (runtime_dir / TOKEN_NAME).unlink(missing_ok=True)
    record.remove(runtime_dir)


def _nobody_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


@contextmanager
def _locked(runtime_dir: Path) -> Iterator[None]:
    """Keeps two `up` or `down` in one runtime directory apart."""
    with (runtime_dir / LOCK_NAME).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise errors.Conflict(
                "another `kvfabric up` or `down` is at work here: wait for it to end"
            ) from error
        yield
