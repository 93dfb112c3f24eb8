"""ControlService over gRPC, and the server that runs it: the manager without Ray.

The core is guarded by one lock; a call holds it for as long as its batch takes.
gRPC's threads are used, not its asyncio: several event loops in one process, as in
tests and embedding, can block one another there.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from kvfabric import logs
from kvfabric.clock import Clock, SystemClock
from kvfabric.errors import FabricError, Refused, Retry
from kvfabric.manager import messages
from kvfabric.manager.calls import log, translated
from kvfabric.manager.core import ManagerCore
from kvfabric.manager.epoch import Fenced, FencedStore, assert_newest, next_epoch, outrank
from kvfabric.manager.events import Answer
from kvfabric.manager.lending_calls import LendingCalls
from kvfabric.manager.moving_calls import MovingCalls
from kvfabric.manager.planning import PLAN_S
from kvfabric.manager.settings import ManagerSettings
from kvfabric.manager.state_calls import StateCalls
from kvfabric.manager.token import peer_token
from kvfabric.membership import NodeState
from kvfabric.metrics import MANAGER_METRICS, Metrics, MetricsServer
from kvfabric.rpc.v1 import control_pb2, control_pb2_grpc, types_pb2
from kvfabric.stores import open_store
from kvfabric.types import PROTOCOL_VERSION

__all__ = ["ControlService", "ManagerServer", "ManagerSettings"]

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
MAX_STREAMS = 1024  # nodes that may be heard at once; each holds one sleeping thread
MAX_CALLS = 64  # other calls under way at once; more get RESOURCE_EXHAUSTED
TICKS_PER_SILENCE = 20
STOP_GRACE_S = 1.0
EPOCH_CHECK_S = 1.0  # how late a manager may notice that another took over
STOP_DEADLINE_S = 5.0
_KEEPALIVE_MS = 10_000  # a peer that is gone without a word is noticed after two of them

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second manager on the same port is an error, not a lottery
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
)


@dataclass(slots=True)
class _Stream:
    number: int
    context: Any
    heard_s: float


# Further groups of calls stand here, before gRPC's own class, which answers UNIMPLEMENTED;
# each is a class of `Calls` in a file of its own.
class ControlService(
    LendingCalls, MovingCalls, StateCalls, control_pb2_grpc.ControlServiceServicer
):
    """The calls of control.proto, answered by a core of its own. Errors become gRPC's."""

    def __init__(
        self,
        settings: ManagerSettings,
        epoch: int,
        clock: Clock,
        metrics: Metrics,
        store: FencedStore,
    ) -> None:
        core = ManagerCore(settings.silence_ms / 1000, clock.now())
        # Parts join the core here, in the order in which they are to be told.
        super().__init__(core, epoch, clock, metrics, store)
        self.load_rules()
        if epoch == 1:  # the first on this store: no node has a state that was not heard of
            core.moving.heads.sure_s = clock.now()
        self._settings = settings
        self._peer_token = peer_token(store)
        self.metrics_address = ""  # where they are served
        self._numbers = itertools.count(1)
        self._open: dict[int, _Stream] = {}
        self._ticked_s = clock.now()
        self._located = metrics.value("kvfabric_manager_locate_keys_total")
        self._locate_seconds = metrics.histogram("kvfabric_manager_locate_seconds")
        metrics.value("kvfabric_manager_epoch").value = epoch

    def Register(  # noqa: N802
        self, request: control_pb2.RegisterRequest, context: Any
    ) -> control_pb2.RegisterResponse:
        cause = f"register {request.node}/{request.incarnation}"
        with translated(context), logs.cause(cause):
            event = messages.register(request)
            self._outrank(request.epoch)
            with self._lock:
                answer = self._core.register(event, self._clock.now())
            if answer.known_incarnation:
                log.warning("node fenced", node=event.node, known=answer.known_incarnation)
            else:
                log.info("node registered", node=event.node, incarnation=event.incarnation)
            return control_pb2.RegisterResponse(
                version=PROTOCOL_VERSION,
                epoch=self._epoch,
                heartbeat_ms=self._settings.heartbeat_ms,
                silence_ms=self._settings.silence_ms,
                known_incarnation=answer.known_incarnation,
                peer_token=self._peer_token,
            )

    def Heartbeat(  # noqa: N802
        self, request_iterator: Iterator[control_pb2.HeartbeatRequest | bytes], context: Any
    ) -> Iterator[control_pb2.HeartbeatResponse]:
        stream = self._open_stream(context)
        try:
            for request in request_iterator:
                with translated(context):
                    if isinstance(request, bytes):  # see _GarbageToHandlers
                        raise Refused("this is no HeartbeatRequest; see control.proto")
                    yield messages.answer(self._hear(request, stream), self._epoch)
        finally:
            with self._lock:
                self._open.pop(stream.number, None)

    def Locate(  # noqa: N802
        self, request: control_pb2.LocateRequest, context: Any
    ) -> control_pb2.LocateResponse:
        with translated(context):
            namespace = messages.namespace_id(request.namespace_id)
            keys = messages.keys(request.keys)
            asker = messages.node_id(request.node) if request.node else None
            with self._lock:
                begun_s = time.perf_counter()
                found = self._core.locate(namespace, keys, prefix=request.prefix, asker=asker)
                self._locate_seconds.observe(time.perf_counter() - begun_s)
                self._located.value += len(keys)
            return control_pb2.LocateResponse(
                place=found.indices, places=messages.places(found.places), epoch=self._epoch
            )

    def ListNodes(  # noqa: N802
        self, request: control_pb2.ListNodesRequest, context: Any
    ) -> control_pb2.ListNodesResponse:
        with translated(context), self._lock:
            now_s, wanted = self._clock.now(), set(request.nodes)
            nodes = [
                messages.node_info(member, self._core.cluster, now_s, request.without_stats)
                for member in self._core.members()
                if not wanted or member.node in wanted
            ]
        return control_pb2.ListNodesResponse(nodes=nodes, epoch=self._epoch)

    def Stats(  # noqa: N802
        self, request: control_pb2.ControlServiceStatsRequest, context: Any
    ) -> control_pb2.ControlServiceStatsResponse:
        with translated(context), self._lock:
            self._set_gauges()
            states = self._core.states()
            counters = [
                types_pb2.Counter(name=name, value=value) for name, value in self._metrics.flatten()
            ]
            return control_pb2.ControlServiceStatsResponse(
                epoch=self._epoch,
                nodes=states[NodeState.LIVE] + states[NodeState.RESYNC],
                keys=self._core.keys,
                replicas=self._core.replicas,
                counters=counters,
                metrics_address=self.metrics_address,
            )

    def Explain(  # noqa: N802
        self, request: control_pb2.ControlServiceExplainRequest, context: Any
    ) -> control_pb2.ControlServiceExplainResponse:
        with translated(context):
            namespace, prefix = messages.explain_subject(request)
            with self._lock:
                return messages.explanation(
                    self._core.explain(namespace, prefix, self._clock.now())
                )

    def tick(self) -> None:
        """Time has passed: see ManagerCore.tick; and silent streams are closed."""
        with self._lock:
            now_s = self._clock.now()
            lost = self._core.tick(now_s)
            silent = self._silent_streams(now_s)
            self._metrics.value("kvfabric_manager_nodes_lost_total").value += len(lost)
            self._set_gauges()
        for stream in silent:
            stream.context.cancel()
        for each in lost:
            log.warning(
                "node lost", node=each.node, incarnation=each.incarnation, replicas=each.replicas
            )

    def check(self) -> None:
        """Broken unless the core's books agree."""
        with self._lock:
            self._core.check()

    def _outrank(self, seen: int) -> None:
        """A node knows of a greater epoch: the store has lost ours, or we are fenced."""
        if seen > self._epoch:
            log.warning("a node has seen a greater epoch", own=self._epoch, seen=seen)
            self._epoch = self._store.epoch = outrank(self._store, self._epoch, seen)
            self._metrics.value("kvfabric_manager_epoch").value = self._epoch

    def _open_stream(self, context: Any) -> _Stream:
        with translated(context), self._lock:
            if len(self._open) >= MAX_STREAMS:
                raise Retry(f"{MAX_STREAMS} nodes are heard already; end some, or come later")
            stream = _Stream(next(self._numbers), context, self._clock.now())
            self._open[stream.number] = stream
            return stream

    def _hear(self, request: control_pb2.HeartbeatRequest, stream: _Stream) -> Answer:
        event = messages.heartbeat(request, stream.number)
        with self._lock:
            stream.heard_s = self._clock.now()
            answer = self._core.heartbeat(event, stream.heard_s)
            outcome = answer.outcome.value
            self._metrics.value("kvfabric_manager_heartbeats_total", outcome).value += 1
            if answer.cause:
                wanted = self._metrics.value(
                    "kvfabric_manager_full_reports_total", answer.cause.value
                )
                wanted.value += 1
        if answer.cause:
            with logs.cause(f"heartbeat {event.node}/{event.incarnation}/{event.sequence}"):
                log.warning("full report wanted", node=event.node, why=answer.cause.value)
        return answer

    def _silent_streams(self, now_s: float) -> list[_Stream]:
        silence_s = self._settings.silence_ms / 1000
        if now_s - self._ticked_s > silence_s / 2:  # we were stopped ourselves, as in the core
            for stream in self._open.values():
                stream.heard_s = now_s
        self._ticked_s = now_s
        return [each for each in self._open.values() if now_s - each.heard_s > silence_s]

    def _set_gauges(self) -> None:
        for state, count in self._core.states().items():
            self._metrics.value("kvfabric_manager_nodes", state.value).value = count
        self._metrics.value("kvfabric_manager_keys").value = self._core.keys
        self._metrics.value("kvfabric_manager_replicas").value = self._core.replicas
        self._set_lending_gauges()
        self._set_moving_gauges()


class ManagerServer:
    """One manager: store, epoch, gRPC, metrics and the passing of time, in threads of its own."""

    def __init__(self, settings: ManagerSettings, clock: Clock | None = None) -> None:
        self.settings = settings
        self.epoch = 0  # of a started server
        self.address = ""  # host:port of ControlService, likewise
        self.metrics_address = ""  # host:port, empty where not served
        self.fenced = threading.Event()  # a newer manager took over; this one has ended
        self._clock = clock or SystemClock()
        self._stopping = threading.Event()
        self._running = contextlib.ExitStack()

    def start(self) -> None:
        """Returns once it serves. Refused where the store or an address cannot be had."""
        with contextlib.ExitStack() as started:
            store = self._open_store(started)
            self.epoch = store.epoch
            metrics = Metrics(MANAGER_METRICS)
            self._service = ControlService(self.settings, self.epoch, self._clock, metrics, store)
            self.address = self._serve(started)
            if self.settings.metrics:
                server = MetricsServer(metrics, self.settings.metrics)
                started.callback(server.stop)
                self.metrics_address = self._service.metrics_address = server.address
            self._stopping.clear()
            watch = functools.partial(self._watch, store)
            for work, name in ((self._tick, "tick"), (self._plan, "plan"), (watch, "watch")):
                thread = threading.Thread(target=work, name=f"manager-{name}", daemon=True)
                thread.start()
                started.callback(thread.join)
            started.callback(self._stopping.set)
            self._running = started.pop_all()
        log.info("manager serves", address=self.address, epoch=self.epoch)

    def stop(self) -> None:
        """Ends calls and streams within STOP_DEADLINE_S, gives all back. May be repeated."""
        self._running.close()

    def check(self) -> None:
        """Broken unless the books of the started server agree. Reads every key: for tests."""
        self._service.check()

    def _open_store(self, started: contextlib.ExitStack) -> FencedStore:
        store = open_store(self.settings.store_address())
        started.callback(store.close)
        return FencedStore(store, next_epoch(store))

    def _serve(self, started: contextlib.ExitStack) -> str:
        pool = ThreadPoolExecutor(MAX_STREAMS + MAX_CALLS, thread_name_prefix="manager-call")
        started.callback(pool.shutdown, wait=False)
        server = grpc.server(
            pool,
            interceptors=[_GarbageToHandlers()],
            options=_OPTIONS,
            maximum_concurrent_rpcs=MAX_STREAMS + MAX_CALLS,
        )
        control_pb2_grpc.add_ControlServiceServicer_to_server(self._service, server)
        listen = self.settings.listen
        try:
            port = server.add_insecure_port(listen)
        except RuntimeError as error:
            raise Refused(
                f"cannot listen on {listen}: {error}; is another manager there? "
                "Stop it, or name another address or port 0"
            ) from error
        server.start()
        started.callback(lambda: server.stop(STOP_GRACE_S).wait(STOP_DEADLINE_S))
        return f"{listen.rpartition(':')[0]}:{port}"

    def _watch(self, store: FencedStore) -> None:
        """Ends the manager when a newer one was started on its store."""
        away = False
        while not self._stopping.wait(EPOCH_CHECK_S):
            try:
                assert_newest(store, store.epoch)
                away = False
            except Fenced as error:
                log.error("fenced", why=str(error))
                self.fenced.set()
                threading.Thread(target=self.stop, name="manager-stop").start()
                return
            except FabricError as error:
                if not away:  # once, not every second
                    log.warning("the store is away", why=str(error), effect="nothing durable")
                away = True

    def _tick(self) -> None:
        interval_s = self.settings.silence_ms / 1000 / TICKS_PER_SILENCE
        while not self._stopping.wait(interval_s):
            try:
                self._service.tick()
            except FabricError:
                log.exception("tick failed")

    def _plan(self) -> None:
        # A thread of its own: a plan for a large cluster takes longer than ticks may wait.
        while not self._stopping.wait(PLAN_S):
            try:
                self._service.plan()
                self._service.keep_drains()
            except Exception:  # lending goes on without plans: nodes borrow when they have to
                log.exception("plan failed")


class _GarbageToHandlers(grpc.ServerInterceptor):
    """Hands what cannot be parsed on a stream to its handler, as the bytes that came.

    grpcio's threaded server never ends a stream whose message it failed to parse
    itself: the call counts as one under way until the process ends.
    """

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if handler is None or not handler.request_streaming:
            return handler

        def parse(raw: bytes) -> Any:
            try:
                return handler.request_deserializer(raw)
            except DecodeError:
                return raw

        return grpc.stream_stream_rpc_method_handler(
            handler.stream_stream, parse, handler.response_serializer
        )
