"""The process behind `kvfabric up`: starts Ray (or joins one) and the fabric's actors on it.

`python -m kvfabric.cluster.launcher PLAN`, PLAN being the JSON of `kvfabric.cluster.plan`. It
reports its progress as JSON lines on standard output, up to one with "ready" or "error".

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

from kvfabric import errors, logs
from kvfabric.cluster import record
from kvfabric.cluster.local_ray import LOOPBACK, LocalRay
from kvfabric.cluster.plan import JoinPlan, LeavePlan, LocalPlan, Plan, from_json
from kvfabric.cluster.processes import Process, marked
from kvfabric.manager.actor import ManagerActor, NodePlan
from kvfabric.manager.fleet import (
    ACTOR_CALL_RETRIES,
    HEAD_RESOURCE,
    MANAGER_ACTOR,
    NODE_ACTOR_PREFIX,
    NODE_RESOURCE,
    RAY_NAMESPACE,
    memory_nodes,
    reason,
)
from kvfabric.manager.settings import ManagerSettings
from kvfabric.rpc.v1 import control_pb2, control_pb2_grpc

logger = logs.logger(part="launcher")

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
        settings = ManagerSettings(
            listen=listen, runtime_dir=plan.runtime_dir, metrics=metrics_of(LOOPBACK)
        )
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
        settings = ManagerSettings(listen=listen, metrics=metrics_of(head["NodeManagerAddress"]))
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


def metrics_of(host: str) -> str:
    """Where the gManager exports its metrics; `kvfabric status --json` tells the port."""
    return os.environ.get("KVFABRIC_MANAGER_METRICS") or f"{host}:0"


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
