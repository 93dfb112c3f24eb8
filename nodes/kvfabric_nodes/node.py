"""One memory node in one object: the core and all its shells, on a thread of their own.

The same object runs in a test, in a Ray actor and under `python -m kvfabric_nodes`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import grpc
import structlog
import uvloop

from kvfabric.clock import Clock, SystemClock
from kvfabric.errors import FabricError, Refused, Retry
from kvfabric.metrics import MetricsServer
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.settings import host_id, make_runtime_dir
from kvfabric.types import PROTOCOL_VERSION
from kvfabric_nodes.attention.calls import AttentionCalls
from kvfabric_nodes.attention.desk import Desk
from kvfabric_nodes.attention.engine import Engine
from kvfabric_nodes.attention.kernels.cpu import cpu_kernels
from kvfabric_nodes.attention.kernels.native import NativeKernel
from kvfabric_nodes.attention.operator_calls import OperatorCalls
from kvfabric_nodes.attention.prepared import Preparations
from kvfabric_nodes.attention.spans import Spans
from kvfabric_nodes.keeper.keeping import Keeping
from kvfabric_nodes.metrics import NodeMetrics
from kvfabric_nodes.neighbours import Neighbours
from kvfabric_nodes.sequences.calls import SequenceCalls
from kvfabric_nodes.sequences.core import Sequences
from kvfabric_nodes.sequences.group_calls import GroupCalls
from kvfabric_nodes.sequences.groups import Groups
from kvfabric_nodes.sequences.handovers import Handovers
from kvfabric_nodes.sequences.state_calls import StateCalls
from kvfabric_nodes.sequences.states import States
from kvfabric_nodes.sequences.steps import Steps
from kvfabric_nodes.serving.grpc_service import MAX_MESSAGE_BYTES, NodeService
from kvfabric_nodes.serving.handler import Handler, Identity
from kvfabric_nodes.serving.server import WireServer
from kvfabric_nodes.settings import NodeSettings
from kvfabric_nodes.store.arena import Arena
from kvfabric_nodes.store.core import NodeCore

log = structlog.get_logger(__name__)

START_TIMEOUT_S = 30.0
ADOPTED_BYTES_PER_S = 1e9  # at least, of what was kept over a restart
STOP_TIMEOUT_S = 15.0
TICK_S = 0.1  # how late a deadline may be noticed on an idle node
REFRESH_S = 0.5  # how old a scraped metric may be


class Node:
    """Serves from `start` to `stop`. The endpoints are known once it has started."""

    def __init__(
        self, settings: NodeSettings, clock: Clock | None = None, *, keeper: bool = False
    ) -> None:
        """`keeper`: a process of its own keeps the memory over a crash of this one."""
        self.settings = settings
        self._has_keeper = keeper
        self.endpoints = types_pb2.Endpoints(host=host_id())
        self.incarnation = time.time_ns()
        self._clock = clock or SystemClock()
        self._began_s = self._clock.now()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="kvfabric-node", daemon=True)
        self._core: NodeCore | None = None
        self.neighbours: Neighbours  # of a node that has started
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Returns once the node serves; raises what kept it from it."""
        self._thread.start()
        timeout_s = START_TIMEOUT_S + self.settings.memory / ADOPTED_BYTES_PER_S
        try:
            self._started.result(timeout_s)
        except TimeoutError as error:
            raise Retry(f"the node did not start within {timeout_s:g} s") from error
        except OSError as error:
            raise Refused(
                f"the node cannot start: {error}; where it lacks files or memory, raise the limit "
                "of open files (ulimit -n), or give it less memory"
            ) from error

    def stop(self) -> None:
        """Ends all sessions and gives the memory back. Safe to repeat."""
        if self._loop is not None and self._stopping is not None:
            with contextlib.suppress(RuntimeError):  # it has stopped already
                self._loop.call_soon_threadsafe(self._stopping.set)
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits for the node to stop; whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def check(self) -> None:
        """Proves the books to the byte, on the core's thread. AssertionError where they err."""
        assert self._loop is not None
        assert self._core is not None
        core = self._core

        async def check() -> None:
            core.check()
            self.sequences.check()
            self.groups.check()
            self.states.check()
            self.handovers.check()
            self.neighbours.check()

        asyncio.run_coroutine_threadsafe(check(), self._loop).result(STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            uvloop.run(self._serve())  # a call takes 10 us less of the node than by asyncio's own
        except BaseException as error:
            if self._started.done():
                log.exception("node_failed")
            else:
                self._started.set_exception(error)

    async def _serve(self) -> None:
        settings = self.settings
        make_runtime_dir(settings.runtime_dir)
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        keeping = Keeping(settings, self._clock)
        restored = await keeping.restored(self._has_keeper)
        self._core = core = restored.core
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(keeping.leave)
            arena = Arena(core.extents.all_ids(), settings.segment_bytes, restored.memory)
            stack.callback(arena.close)
            metrics = NodeMetrics(settings.node, self.incarnation, core, arena)
            verifier = stack.enter_context(ThreadPoolExecutor(1, "kvfabric-verify"))
            identity = Identity(settings.node, settings.token.encode(), settings.manager)
            handler = Handler(core, arena, self._clock, identity, verifier, metrics)
            self._offer_sequences(core, handler, verifier)
            self._offer_attention(core, handler, stack)
            if self._has_keeper:
                metrics.keeper = keeping.tally
                keeping.attach(restored, arena, handler)
                stack.push_async_callback(keeping.stop)  # when nothing writes any more
                self._begin(keeping.run())
            stack.push_async_callback(self._end_tasks)
            self._open_metrics(metrics, stack)
            await self._open_grpc(handler, stack)
            server = self._open_wire(handler, stack)
            stack.callback(keeping.ends, keep=settings.keep_on_stop)
            register = self._registration(metrics)
            self.neighbours = Neighbours(
                handler,
                settings,
                register,
                server.on_core,
                self.sequences.victims,
                self.groups,
                self.handovers,
            )
            stack.push_async_callback(self.neighbours.close)
            self._begin(self._tick(core, metrics))
            self._introduce(self.neighbours, metrics)
            log.info("node_serves", node=settings.node, **_addresses(self.endpoints))
            self._started.set_result(None)
            await self._stopping.wait()

    def _offer_sequences(self, core: NodeCore, handler: Handler, verifier: Executor) -> None:
        # Numbered from the incarnation on: nobody takes another's for the one of an earlier start.
        self.sequences = Sequences(core, first_id=self.incarnation)
        self.groups = Groups(core, first_id=self.incarnation)
        self.states = States(core, first_version=self.incarnation, began_s=self._began_s)
        self.steps = Steps()
        self.sequence_calls = SequenceCalls(handler, self.sequences, verifier)
        self.group_calls = GroupCalls(handler, self.groups, self.steps)
        self.handovers = Handovers(self.states, first_offer=self.incarnation)
        self.state_calls = StateCalls(handler, self.handovers)
        for calls in (self.sequence_calls, self.group_calls, self.state_calls):
            handler.offer(calls.calls())

    def _offer_attention(
        self, core: NodeCore, handler: Handler, stack: contextlib.AsyncExitStack
    ) -> None:
        engine, preparations, threads = None, None, self.settings.attention_threads
        tally = handler.metrics.attention
        kernels = cpu_kernels(threads)
        if threads and NativeKernel.name in kernels.flows:
            flow = kernels.flows[NativeKernel.name]
            preparations = Preparations(core, threads, tally, flow)
            stack.callback(preparations.close)
            handler.takers["attend"] = preparations.serve
        if threads:
            engine = Engine(self._clock, tally, preparations.turn if preparations else nullcontext)
            stack.push_async_callback(engine.close)
        spans = Spans(core, self.sequences, handler.arena.address)
        desk = Desk(handler, spans, engine)
        self.attention = AttentionCalls(handler, desk, kernels, preparations)
        handler.offer({**self.attention.calls(), **OperatorCalls(desk).calls()})

    def _introduce(self, neighbours: Neighbours, metrics: NodeMetrics) -> None:
        """Sequences, groups and steps get to know the other nodes and the manager."""
        self.sequence_calls.room.fetch_home = neighbours.homing.fetch_home
        self.sequence_calls.room.whereabouts = neighbours.lending.whereabouts
        self.sequence_calls.room.discard = neighbours.lending.discard
        self.sequence_calls.room.claim = neighbours.lending_calls.claim
        self.group_calls.call_peer = neighbours.peers.call
        metrics.gauges["sequences"] = lambda: len(self.sequences.all)
        heartbeat = neighbours.heartbeat
        if heartbeat is not None:
            self.sequence_calls.room.make_room = neighbours.lending_calls.make_room
            self.group_calls.places = heartbeat.inquiries.places
            self.group_calls.fetch_home = neighbours.homing.fetch_home
            self.state_calls.find = heartbeat.inquiries.find_state
            heartbeat.reports.sequences = self.sequences.columns
            heartbeat.reports.heads = self.handovers.report
            heartbeat.reports.steps = self.steps.take
            self._begin(heartbeat.run())

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        assert self._loop is not None
        task = self._loop.create_task(work)
        task.add_done_callback(_log_failure)
        self._tasks.append(task)

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _registration(self, metrics: NodeMetrics) -> control_pb2.RegisterRequest:
        return control_pb2.RegisterRequest(
            min_version=PROTOCOL_VERSION,
            max_version=PROTOCOL_VERSION,
            node=self.settings.node,
            incarnation=self.incarnation,
            endpoints=self.endpoints,
            tiers=metrics.stats().tiers,
            labels=self.settings.labels,
        )

    async def _tick(self, core: NodeCore, metrics: NodeMetrics) -> None:
        """Until cancelled. A part that fails keeps the deadlines of no other part from ending."""
        parts: dict[str, Callable[[float], None]] = {
            "core": core.tick,
            "neighbours": self.neighbours.tick,
            "sequences": self.sequences.tick,
            "groups": self.group_calls.tick,
            "states": self.states.tick,
            "metrics": _Seldom(metrics.refresh, REFRESH_S),
        }
        failing: set[str] = set()
        while True:
            now_s = self._clock.now()
            for name, part in parts.items():
                try:
                    part(now_s)
                    failing.discard(name)
                except Exception:
                    if name not in failing:  # once, not ten times a second
                        log.exception("tick_failed", part=name)
                    failing.add(name)
            await asyncio.sleep(TICK_S)

    def _open_metrics(self, metrics: NodeMetrics, stack: contextlib.AsyncExitStack) -> None:
        if self.settings.metrics:
            server = MetricsServer(metrics.exported, self.settings.metrics)
            stack.callback(server.stop)
            self.endpoints.metrics_address = server.address

    async def _open_grpc(self, handler: Handler, stack: contextlib.AsyncExitStack) -> None:
        if not self.settings.grpc:
            return
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),  # a port in use is an error, not shared
            ]
        )
        service = NodeService(handler)
        service.add_to(server)
        host, _, _ = self.settings.grpc.rpartition(":")
        try:
            port = server.add_insecure_port(self.settings.grpc)
        except RuntimeError as error:
            raise Refused(
                f"cannot serve gRPC on {self.settings.grpc}: it is in use, or not this machine's; "
                "choose another address, or port 0"
            ) from error
        await server.start()
        self._begin(service.end_silent_sessions())
        stack.push_async_callback(server.stop, 1.0)
        self.endpoints.grpc_address = f"{host}:{port}"

    def _open_wire(self, handler: Handler, stack: contextlib.AsyncExitStack) -> WireServer:
        server = WireServer(handler)
        stack.push_async_callback(server.close)
        path = self.settings.unix_path
        server.listen(_bind_unix(path))
        stack.callback(path.unlink, missing_ok=True)
        self.endpoints.unix_path = str(path)
        if self.settings.tcp:
            host, _, port = self.settings.tcp.rpartition(":")
            try:
                sock = socket.create_server((host, int(port)), backlog=128)
            except (OSError, ValueError) as error:
                raise Refused(
                    f"cannot listen on tcp {self.settings.tcp}: {error}; choose another address, "
                    "or port 0"
                ) from error
            server.listen(sock)
            self.endpoints.tcp_address = f"{host}:{sock.getsockname()[1]}"
        return server


class _Seldom:
    """A call that is not worth making at every tick."""

    def __init__(self, call: Callable[[], object], every_s: float) -> None:
        self._call = call
        self._every_s = every_s
        self._next_s = 0.0

    def __call__(self, now_s: float) -> None:
        if now_s >= self._next_s:
            self._next_s = now_s + self._every_s
            self._call()


def own_process() -> None:
    """For a process that is a node and nothing else: collect garbage seldom.

    A collection looks at every shard's record, and the loop stands still meanwhile; records
    are freed by their reference counts, so that only rare cycles wait.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1000)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("task_failed", task=task.get_coro(), exc_info=task.exception())


def _bind_unix(path: Path) -> socket.socket:
    """A socket at `path`, in place of one that nobody listens on any more."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)  # else it waits where a stopped node's backlog is full
                if probe.connect_ex(str(path)) in (0, errno.EAGAIN):
                    raise Refused(
                        f"another node serves on {path}; stop it, or give this one another name"
                    )
            path.unlink()
        sock.bind(str(path))
        os.chmod(path, 0o600)
    except OSError as error:
        sock.close()
        raise Refused(f"cannot listen on {path}: {error}; choose another runtime dir") from error
    except FabricError:
        sock.close()
        raise
    return sock


def _addresses(endpoints: types_pb2.Endpoints) -> dict[str, str]:
    return {field.name: value for field, value in endpoints.ListFields()}
