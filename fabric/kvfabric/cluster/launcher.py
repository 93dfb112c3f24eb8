"""The process behind `kvfabric up`: starts Ray (or joins one) and the fabric's actors on it.

`python -m kvfabric.cluster.launcher PLAN`, PLAN being the JSON of `kvfabric.cluster.plan`. It
reports its progress as JSON lines on standard output, up to one with "ready" or "error".

How Ray is kept private on one machine. By default Ray rewrites 127.0.0.1 to the machine's
outward address and its servers listen on every interface: anybody who reaches a port may run
code. `ray start` offers no way out for a second Ray node, but its own `Node` class does: with
`node_ip_address="127.0.0.1"` every server of Ray 2.60 (GCS, raylets, workers, agents) binds to
loopback only, for root and for ordinary users alike, without a network namespace. That is
why this file, and no other, uses `ray._private`, and why the package pins Ray's minor version.
Ray's drivers would still rewrite the address that they connect to, unless Ray believes that it
runs on a system without clusters (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0). What is left on
loopback is open to other users of the machine: so token authentication is switched on at both
sides (RAY_AUTH_MODE, never left to Ray's default), with a token of this `up` in a file that
only its user can read.

The launcher stays: Ray's processes are its children, and the kernel ends them when it dies
(PR_SET_PDEATHSIG), whatever the reason. SIGTERM, and the end of standard input if it is
attached to a terminal's `kvfabric up`, bring everything down in order.
"""

from __future__ import annotations

import json
import logging
import os
import random
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import grpc
import ray
from ray._private.node import Node as RayNode
from ray._private.parameter import RayParams

from kvfabric import errors, logs
from kvfabric.cluster import record
from kvfabric.cluster.plan import JoinPlan, LeavePlan, LocalPlan, Plan, from_json
from kvfabric.cluster.processes import Process, marked
from kvfabric.manager.actor import ManagerActor, NodePlan
from kvfabric.manager.fleet import (
    ACTOR_CALL_RETRIES,
    HEAD_RESOURCE,
    MANAGER_ACTOR,
    NODE_ACTOR_PREFIX,
    NODE_LABEL,
    NODE_RESOURCE,
    RAY_NAMESPACE,
    memory_nodes,
    reason,
)
from kvfabric.manager.settings import ManagerSettings
from kvfabric.rpc.v1 import control_pb2, control_pb2_grpc

logger = logs.logger(part="launcher")

LOOPBACK = "127.0.0.1"
# Nothing of the fabric goes through Ray's object store: the least that Ray accepts.
OBJECT_STORE_BYTES = 80 * 1024 * 1024
ACTOR_DEADLINE_S = 60.0  # for an actor's process to start and answer
NODES_DEADLINE_S = 60.0  # for all rManagers to register with the gManager
STOP_DEADLINE_S = 5.0
WATCH_S = 1.0
POLL_S = 0.2
MANAGER_PORTS = range(20_000, 32_768)


class _Terminated(BaseException):
    """SIGTERM arrived."""


class Progress:
    """Tells `kvfabric up` how far the launcher is. After the last word nobody listens."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def step(self, text: str) -> None:
        self._write(step=text)

    def ready(self, fabric: record.Fabric) -> None:
        self._write(ready=list(fabric.nodes))
        self._stream.close()

    def error(self, error: BaseException) -> None:
        if not self._stream.closed:
            self._write(error=str(error) or repr(error), kind=type(error).__name__)
            self._stream.close()

    def _write(self, **fields: object) -> None:
        try:
            print(json.dumps(fields), file=self._stream, flush=True)
        except BrokenPipeError:
            logger.warning("nobody listens to the progress", **fields)


class LocalRay:
    """A Ray of our own: a head, which is the first memory node, and one raylet per further one."""

    def __init__(self, plan: LocalPlan) -> None:
        self._plan = plan
        self._nodes: list[RayNode] = []

    @property
    def address(self) -> str:
        return str(self._nodes[0].gcs_address)

    def start_node(self, name: str) -> None:
        """The first call starts the head. Must run in the main thread: Ray's processes end with
        the thread that started them."""
        head = not self._nodes
        parameters = RayParams(
            node_ip_address=LOOPBACK,
            temp_dir=self._plan.scratch,
            object_store_memory=OBJECT_STORE_BYTES,
            num_cpus=0,
            num_gpus=0,
            resources={NODE_RESOURCE: 1},
            labels={NODE_LABEL: name},
            include_log_monitor=False,  # type: ignore[arg-type]  # a flag, in spite of its hint
            include_dashboard=False,
            no_monitor=True,
            gcs_server_port=0 if head else None,
            gcs_address=None if head else self.address,
        )
        self._nodes.append(
            RayNode(parameters, head=head, shutdown_at_exit=False, spawn_reaper=True)
        )

    def dead(self) -> list[str]:
        """The kinds of Ray processes that died on their own."""
        return [kind for node in self._nodes for kind, _ in node.dead_processes()]

    def stop(self) -> None:
        for node in reversed(self._nodes):
            node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)


def run_local(plan: LocalPlan, progress: Progress) -> None:
    """Runs a fabric until it is told to end; then only its record and Ray's files are left."""
    local = LocalRay(plan)
    try:
        for index in range(plan.nodes):
            progress.step(f"starting Ray {'node' if index else 'head'} for n{index}")
            local.start_node(f"n{index}")
        connect(local.address)
        progress.step("starting the gManager")
        listen = f"{LOOPBACK}:{plan.manager_port or free_port()}"
        settings = ManagerSettings(listen=listen, runtime_dir=plan.runtime_dir)
        manager = start_manager(settings, NodePlan(listen, plan.memory_bytes, plan.runtime_dir))
        progress.step("starting the rManagers")
        names = await_nodes(manager, listen, plan.nodes)
        fabric = record.Fabric(
            manager=listen,
            ray=local.address,
            mark=plan.mark,
            scratch=plan.scratch,
            nodes=tuple(names),
            processes=_launcher_first(marked(plan.mark)),
        )
        record.write(Path(plan.runtime_dir), fabric)
        progress.ready(fabric)
        watch(local, attached=plan.attached)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        if ray.is_initialized():
            stop_actors()
            ray.shutdown()
        local.stop()


def run_join(plan: JoinPlan, progress: Progress) -> None:
    """Starts the fabric's actors in a Ray that others run, and leaves them to it."""
    progress.step(f"connecting to Ray at {plan.address}")
    connect(plan.address)
    try:
        present = memory_nodes(ray.nodes())
        wanted = plan.nodes or len(present)
        if not wanted:
            raise errors.Refused(
                f"no node of the Ray at {plan.address} offers the resource {NODE_RESOURCE!r}: "
                f"start its memory nodes with --resources='{{\"{NODE_RESOURCE}\": 1}}'"
            )
        progress.step("starting the gManager")
        head = next(node for node in ray.nodes() if HEAD_RESOURCE in node["Resources"])
        listen = f"{head['NodeManagerAddress']}:{plan.manager_port}"
        settings = ManagerSettings(listen=listen)
        manager = start_manager(settings, NodePlan(listen, plan.memory_bytes))
        progress.step("starting the rManagers")
        names = await_nodes(manager, listen, wanted)
        fabric = record.Fabric(
            manager=listen, ray=plan.address, mark="", scratch="", nodes=tuple(names)
        )
        record.write(Path(plan.runtime_dir), fabric)
        progress.ready(fabric)
    finally:
        ray.shutdown()


def run_leave(plan: LeavePlan, progress: Progress) -> None:
    """Ends the fabric's actors in a Ray that others run."""
    progress.step(f"connecting to Ray at {plan.address}")
    connect(plan.address)
    try:
        for actor in stop_actors():
            ray.kill(actor, no_restart=True)
        progress.ready(record.Fabric("", plan.address, "", ""))
    finally:
        ray.shutdown()


def connect(address: str) -> None:
    """Makes this process a driver of the Ray at `address`."""
    own: dict[str, Any] = (
        {"_node_ip_address": LOOPBACK} if address.startswith(f"{LOOPBACK}:") else {}
    )
    try:
        ray.init(
            address=address,
            namespace=RAY_NAMESPACE,
            log_to_driver=False,
            logging_level=logging.WARNING,
            **own,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise errors.Unreachable(
            f"no Ray answers at {address} ({error}): start it, or run `kvfabric up` without "
            "--address to have one started"
        ) from error


def start_manager(settings: ManagerSettings, nodes: NodePlan) -> Any:
    """The handle of the gManager's actor, once it serves; one that is there already stays."""
    actor_class: Any = ray.remote(ManagerActor)
    manager = actor_class.options(
        name=MANAGER_ACTOR,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=ACTOR_CALL_RETRIES,
        num_cpus=0,
        resources={HEAD_RESOURCE: 0.001},
    ).remote(settings, nodes)
    try:
        ray.get(manager.address.remote(), timeout=ACTOR_DEADLINE_S)
    except ray.exceptions.RayError as error:
        raise errors.Refused(f"the gManager did not start: {reason(error)}") from error
    return manager


def await_nodes(manager: Any, address: str, wanted: int) -> list[str]:
    """The names of the living nodes, once `wanted` of them have registered."""
    # The machine's proxy settings are for the outside, not for the fabric.
    channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
    stub = control_pb2_grpc.ControlServiceStub(channel)
    alive: list[str] = []
    deadline = time.monotonic() + NODES_DEADLINE_S
    with channel:
        while time.monotonic() < deadline:
            nodes = stub.ListNodes(
                control_pb2.ListNodesRequest(), timeout=ACTOR_DEADLINE_S, wait_for_ready=True
            ).nodes
            alive = sorted(info.node for info in nodes if info.alive)
            if len(alive) >= wanted:
                return alive
            troubles = ray.get(manager.troubles.remote(), timeout=ACTOR_DEADLINE_S)
            for name, why in troubles.items():
                raise errors.Refused(f"the rManager of {name} did not start: {why}")
            time.sleep(POLL_S)
    raise errors.DeadlineExceeded(
        f"{len(alive)} of {wanted} rManagers registered within {NODES_DEADLINE_S:g} s: "
        "see the actors' logs in Ray's session directory"
    )


def stop_actors() -> list[Any]:
    """Asks gManager and rManagers to stop serving, within a deadline; returns their handles."""
    names = [
        name
        for name in ray.util.list_named_actors()
        if name == MANAGER_ACTOR or name.startswith(NODE_ACTOR_PREFIX)
    ]
    # The gManager first: its fleet would start rManagers again.
    actors = [ray.get_actor(name) for name in sorted(names)]
    for actor in actors:
        answer: Any = actor.stop.remote()
        done, _ = ray.wait([answer], timeout=STOP_DEADLINE_S)
        if not done:
            logger.warning("an actor did not stop in time", actor=str(actor))
    return actors


def watch(local: LocalRay, *, attached: bool) -> None:
    """Returns when standard input ends (if attached); raises if Ray dies or SIGTERM arrives."""
    watched = [sys.stdin] if attached else []
    while not (dead := local.dead()):
        if select.select(watched, [], [], WATCH_S)[0] and not os.read(sys.stdin.fileno(), 1):
            return
    raise errors.Broken(f"Ray's {', '.join(dead)} died: the fabric comes down with it")


def _launcher_first(processes: list[Process]) -> tuple[Process, ...]:
    return tuple(sorted(processes, key=lambda process: process.pid != os.getpid()))


def free_port() -> int:
    """A port of loopback below those that the kernel gives to outgoing connections.

    One of theirs could be taken by a client of the gManager while that restarts.
    """
    for port in random.sample(MANAGER_PORTS, k=50):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    raise errors.Retry("no free port found for the gManager: name one with --manager-port")


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main() -> int:
    logs.configure()
    # Standard output is for progress alone, and no child may hold it open.
    progress = Progress(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, _terminate)
    plan: Plan = from_json(sys.argv[1])
    try:
        match plan:
            case LocalPlan():
                run_local(plan, progress)
            case JoinPlan():
                run_join(plan, progress)
            case LeavePlan():
                run_leave(plan, progress)
    except _Terminated:
        logger.info("told to end")
    except Exception as error:
        logger.exception("the launcher failed")
        progress.error(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
