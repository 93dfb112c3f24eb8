"""ControlService over real gRPC, the server in this process."""

from __future__ import annotations

import queue
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from pydantic import ValidationError

from kvfabric.clock import ManualClock
from kvfabric.directory import Inventory
from kvfabric.errors import Broken, Refused
from kvfabric.manager import service
from kvfabric.manager.epoch import EPOCH_KEY, next_epoch
from kvfabric.manager.messages import MAX_HEADS, MAX_LOCATE_KEYS, MAX_REPORT_KEYS
from kvfabric.manager.service import MAX_MESSAGE_BYTES, ManagerServer, ManagerSettings
from kvfabric.manager.token import TOKEN_BYTES, TOKEN_KEY, peer_token
from kvfabric.rpc.v1 import control_pb2 as pb
from kvfabric.rpc.v1 import control_pb2_grpc, types_pb2
from kvfabric.stores import MemoryStore
from kvfabric.stores.sqlite import SqliteStore

TIMEOUT_S = 20.0
ROOM = b"r" * 32
KEYS = [bytes([number]) * 32 for number in range(4)]


@pytest.fixture
def server() -> Iterator[ManagerServer]:
    server = ManagerServer(ManagerSettings(listen="127.0.0.1:0", store="memory:"))
    server.start()
    yield server
    server.check()
    server.stop()


@pytest.fixture
def stub(server: ManagerServer) -> Iterator[control_pb2_grpc.ControlServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield control_pb2_grpc.ControlServiceStub(channel)


def registration(**changes: object) -> pb.RegisterRequest:
    request = pb.RegisterRequest(
        min_version=1,
        max_version=1,
        node="n0",
        incarnation=1,
        endpoints=types_pb2.Endpoints(host="h", tcp_address="127.0.0.1:9"),
        tiers=[types_pb2.TierStats(tier=types_pb2.TIER_DRAM, capacity_bytes=64)],
        labels={"zone": "a"},
    )
    request.MergeFrom(pb.RegisterRequest(**changes))  # type: ignore[arg-type]
    return request


def beat(sequence: int, keys: list[bytes], holds: list[bytes] | None = None) -> pb.HeartbeatRequest:
    """n0 adds `keys` of 8 bytes each, and holds `holds` (default: the same) now."""
    inventory = Inventory().plus(b"".join(keys if holds is None else holds))
    return pb.HeartbeatRequest(
        node="n0",
        incarnation=1,
        sequence=sequence,
        added=[inventory_of(keys)] if keys else [],
        inventory_count=inventory.count,
        inventory_hash=inventory.hash,
    )


def inventory_of(keys: list[bytes]) -> pb.Inventory:
    return pb.Inventory(
        namespace_id=ROOM, tier=types_pb2.TIER_DRAM, keys=b"".join(keys), size_bytes=[8]
    )


class Stream:
    """One heartbeat stream, a question and an answer at a time."""

    def __init__(self, stub: control_pb2_grpc.ControlServiceStub) -> None:
        self._requests: queue.SimpleQueue[pb.HeartbeatRequest | None] = queue.SimpleQueue()
        self._answers = stub.Heartbeat(iter(self._requests.get, None), timeout=TIMEOUT_S)

    def ask(self, request: pb.HeartbeatRequest) -> pb.HeartbeatResponse:
        self._requests.put(request)
        return next(self._answers)

    def close(self) -> None:
        self._requests.put(None)
        assert list(self._answers) == []


def test_a_node_registers_reports_and_is_located(
    stub: control_pb2_grpc.ControlServiceStub,
) -> None:
    answer = stub.Register(registration(), timeout=TIMEOUT_S)
    assert answer == pb.RegisterResponse(
        version=1, epoch=1, heartbeat_ms=500, silence_ms=5000, peer_token=answer.peer_token
    )
    assert len(answer.peer_token) == TOKEN_BYTES
    stream = Stream(stub)
    assert stream.ask(beat(1, KEYS[:2])) == pb.HeartbeatResponse(epoch=1, sequence=1)
    assert stream.ask(beat(3, [], KEYS[:2])) == pb.HeartbeatResponse(
        epoch=1, sequence=3, want_full=True
    )
    stream.close()

    home = pb.Place(nodes=["n0"], tiers=[types_pb2.TIER_DRAM])
    asked = pb.LocateRequest(namespace_id=ROOM, keys=[KEYS[0], KEYS[3], KEYS[1]])
    assert stub.Locate(asked, timeout=TIMEOUT_S) == pb.LocateResponse(
        place=[0, 1, 0], places=[home], epoch=1
    )
    asked.prefix = True
    assert stub.Locate(asked, timeout=TIMEOUT_S) == pb.LocateResponse(
        place=[0], places=[home], epoch=1
    )


def test_a_state_is_found_where_it_is_told_of(stub: control_pb2_grpc.ControlServiceStub) -> None:
    stub.Register(registration(), timeout=TIMEOUT_S)
    stub.Register(registration(node="n1"), timeout=TIMEOUT_S)
    request = pb.FindStateRequest(namespace_id=ROOM, name=bytes(32), node="n1", create=True)
    assert stub.FindState(request, timeout=TIMEOUT_S) == pb.FindStateResponse()  # the first epoch

    stream = Stream(stub)
    told = beat(1, [])
    told.heads.add(namespace_id=ROOM, names=bytes(32))
    stream.ask(told)
    assert stub.FindState(request, timeout=TIMEOUT_S).node == "n0"
    stream.close()


def test_operators_see_nodes_and_numbers(stub: control_pb2_grpc.ControlServiceStub) -> None:
    stub.Register(registration(), timeout=TIMEOUT_S)
    stream = Stream(stub)
    message = beat(1, KEYS[:3])
    message.stats.sessions = 5
    stream.ask(message)
    stream.ask(beat(1, []))
    stream.close()
    stub.Locate(pb.LocateRequest(namespace_id=ROOM, keys=KEYS), timeout=TIMEOUT_S)

    listed = stub.ListNodes(pb.ListNodesRequest(), timeout=TIMEOUT_S)
    listed.nodes[0].silent_ms = 0
    assert listed == pb.ListNodesResponse(
        epoch=1,
        nodes=[
            pb.NodeInfo(
                node="n0",
                incarnation=1,
                endpoints=registration().endpoints,
                stats=types_pb2.NodeStats(sessions=5),
                labels={"zone": "a"},
                alive=True,
            )
        ],
    )
    stats = stub.Stats(pb.ControlServiceStatsRequest(), timeout=TIMEOUT_S)
    assert (stats.epoch, stats.nodes, stats.keys, stats.replicas) == (1, 1, 3, 3)
    counters = {counter.name: counter.value for counter in stats.counters}
    assert counters['kvfabric_manager_nodes{state="live"}'] == 1
    assert counters['kvfabric_manager_heartbeats_total{outcome="applied"}'] == 1
    assert counters['kvfabric_manager_heartbeats_total{outcome="duplicate"}'] == 1
    assert counters["kvfabric_manager_locate_keys_total"] == 4
    assert counters["kvfabric_manager_locate_seconds_count"] == 1


def test_one_node_is_told_of_without_its_numbers(
    stub: control_pb2_grpc.ControlServiceStub,
) -> None:
    """All that a node asks; all nodes with their numbers would fit no answer."""
    for name in ("n0", "n1", "n2"):
        request = registration()
        request.node = name
        stub.Register(request, timeout=TIMEOUT_S)
    asked = pb.ListNodesRequest(nodes=["n1", "n9"], without_stats=True)
    (listed,) = stub.ListNodes(asked, timeout=TIMEOUT_S).nodes
    assert listed.node == "n1"
    assert listed.endpoints == registration().endpoints
    assert listed.alive
    assert not listed.HasField("stats")


def test_a_fenced_node_learns_the_incarnation_that_is_known(
    stub: control_pb2_grpc.ControlServiceStub,
) -> None:
    stub.Register(registration(incarnation=7), timeout=TIMEOUT_S)

    answer = stub.Register(registration(), timeout=TIMEOUT_S)

    assert answer.known_incarnation == 7
    stream = Stream(stub)
    assert stream.ask(beat(1, KEYS)).want_register
    stream.close()


def test_explain_answers_with_events_and_places(
    stub: control_pb2_grpc.ControlServiceStub,
) -> None:
    stub.Register(registration(), timeout=TIMEOUT_S)
    stream = Stream(stub)
    stream.ask(beat(1, KEYS[:2]))
    stream.close()

    for namespace in (ROOM, b""):
        asked = pb.ControlServiceExplainRequest(namespace_id=namespace, key=KEYS[1][:2])
        answer = stub.Explain(asked, timeout=TIMEOUT_S)
        assert [(event.node, event.what, event.why) for event in answer.events] == [
            ("n0", "registered", "incarnation 1"),
            ("n0", "added", "heartbeat 1, dram"),
        ]
        assert list(answer.places) == [pb.Place(nodes=["n0"], tiers=[types_pb2.TIER_DRAM])]


def test_a_silent_node_is_listed_as_lost() -> None:
    server = ManagerServer(
        ManagerSettings(listen="127.0.0.1:0", store="memory:", heartbeat_ms=50, silence_ms=200)
    )
    server.start()
    with grpc.insecure_channel(server.address) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        stub.Register(registration(), timeout=TIMEOUT_S)

        until_s = time.monotonic() + TIMEOUT_S
        while stub.ListNodes(pb.ListNodesRequest(), timeout=TIMEOUT_S).nodes[0].alive:
            assert time.monotonic() < until_s
            time.sleep(0.02)

        counters = stub.Stats(pb.ControlServiceStatsRequest(), timeout=TIMEOUT_S).counters
        assert types_pb2.Counter(name="kvfabric_manager_nodes_lost_total", value=1) in counters
    server.check()
    server.stop()


def test_a_silent_stream_is_closed() -> None:
    server = ManagerServer(
        ManagerSettings(listen="127.0.0.1:0", store="memory:", heartbeat_ms=50, silence_ms=200)
    )
    server.start()
    with grpc.insecure_channel(server.address) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        stub.Register(registration(), timeout=TIMEOUT_S)
        stream = Stream(stub)
        stream.ask(beat(1, KEYS))

        with pytest.raises(grpc.RpcError) as failure:
            next(stream._answers)  # nothing more is sent

    assert isinstance(failure.value, grpc.Call)
    assert failure.value.code() is grpc.StatusCode.CANCELLED
    server.stop()


def test_a_manager_that_was_stopped_blames_nobody() -> None:
    clock = ManualClock()
    server = ManagerServer(ManagerSettings(listen="127.0.0.1:0", store="memory:"), clock)
    server.start()
    with grpc.insecure_channel(server.address) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        stub.Register(registration(), timeout=TIMEOUT_S)
        stream = Stream(stub)
        stream.ask(beat(1, KEYS))

        clock.advance(100.0)
        server._service.tick()

        assert stream.ask(beat(2, [], KEYS)) == pb.HeartbeatResponse(epoch=1, sequence=2)
        assert stub.ListNodes(pb.ListNodesRequest(), timeout=TIMEOUT_S).nodes[0].alive
        stream.close()
    server.stop()


def test_one_stream_too_many_is_told_to_come_later(
    stub: control_pb2_grpc.ControlServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_STREAMS", 1)
    stub.Register(registration(), timeout=TIMEOUT_S)
    first = Stream(stub)
    first.ask(beat(1, KEYS))

    with pytest.raises(grpc.RpcError, match="1 nodes are heard already") as failure:
        Stream(stub).ask(beat(2, [], KEYS))
    assert isinstance(failure.value, grpc.Call)
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE

    # A place that was given back is there for the next
    first.close()
    until_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            assert Stream(stub).ask(beat(2, [], KEYS)).sequence == 2
        except grpc.RpcError:
            assert time.monotonic() < until_s
        else:
            break


def test_metrics_are_served() -> None:
    server = ManagerServer(
        ManagerSettings(listen="127.0.0.1:0", store="memory:", metrics="127.0.0.1:0")
    )
    server.start()
    url = f"http://{server.metrics_address}/metrics"
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        text = answer.read().decode()
    server.stop()

    assert "\nkvfabric_manager_epoch 1.0\n" in text


Call = Callable[[control_pb2_grpc.ControlServiceStub], object]


def locate(**fields: object) -> Call:
    request = pb.LocateRequest(**fields)  # type: ignore[arg-type]
    return lambda stub: stub.Locate(request, timeout=TIMEOUT_S)


def register(**changes: object) -> Call:
    return lambda stub: stub.Register(registration(**changes), timeout=TIMEOUT_S)


def heartbeat(**fields: object) -> Call:
    message = beat(1, [])
    message.MergeFrom(pb.HeartbeatRequest(**fields))  # type: ignore[arg-type]
    return lambda stub: next(stub.Heartbeat(iter([message]), timeout=TIMEOUT_S))


def explain(**fields: object) -> Call:
    request = pb.ControlServiceExplainRequest(**fields)  # type: ignore[arg-type]
    return lambda stub: stub.Explain(request, timeout=TIMEOUT_S)


def find_state(**fields: object) -> Call:
    request = pb.FindStateRequest(**fields)  # type: ignore[arg-type]
    return lambda stub: stub.FindState(request, timeout=TIMEOUT_S)


def heads(**fields: object) -> Call:
    return heartbeat(heads=[pb.Heads(**fields)])  # type: ignore[arg-type]


def added(**changes: object) -> list[pb.Inventory]:
    inventory = inventory_of(KEYS[:2])
    inventory.MergeFrom(pb.Inventory(**changes))  # type: ignore[arg-type]
    return [inventory]


REFUSED = grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        (locate(keys=KEYS), REFUSED, "a namespace id is 32 bytes, not 0; take the one that Hello"),
        (locate(namespace_id=ROOM, keys=[b"short"]), REFUSED, "key 0 has 5 bytes"),
        (locate(namespace_id=ROOM, keys=[b""]), REFUSED, "key 0 has 0 bytes"),
        (
            locate(namespace_id=ROOM, keys=[KEYS[0]] * (MAX_LOCATE_KEYS + 1)),
            REFUSED,
            "4097 keys in one call are over 4096; ask in parts",
        ),
        (register(node="../n0"), REFUSED, "'../n0' cannot name a node; take 1 to 128 letters"),
        (
            register(min_version=2, max_version=3),
            grpc.StatusCode.FAILED_PRECONDITION,
            "this manager speaks protocol version 1, the node 2 to 3",
        ),
        (heartbeat(node="é"), REFUSED, "cannot name a node"),
        (heartbeat(added=added(tier=9)), REFUSED, "9 is no tier"),
        (heartbeat(added=added(namespace_id=b"x")), REFUSED, "a namespace id is 32 bytes, not 1"),
        (heartbeat(added=added(keys=b"x" * 31)), REFUSED, "31 bytes of keys are no multiple of 32"),
        (heartbeat(added=added(size_bytes=[1, 2])), REFUSED, "3 sizes for 2 keys; give one for"),
        (
            heartbeat(added=added(keys=bytes(32 * (MAX_REPORT_KEYS + 1)))),
            REFUSED,
            "65537 keys in one heartbeat are over 65536; set `more`",
        ),
        (heads(namespace_id=b"x"), REFUSED, "a namespace id is 32 bytes, not 1"),
        (heads(namespace_id=ROOM, names=b"x"), REFUSED, "1 bytes of states' names"),
        (
            heads(namespace_id=ROOM, names=bytes(32 * (MAX_HEADS + 1))),
            REFUSED,
            "a heartbeat tells of at most 131072",
        ),
        (heads(namespace_id=ROOM, names=bytes(32), node="../n0"), REFUSED, "cannot name a node"),
        (find_state(namespace_id=ROOM, name=b"x", node="n0"), REFUSED, "1 bytes; it has 32"),
        (find_state(namespace_id=b"x", name=bytes(32), node="n0"), REFUSED, "32 bytes, not 1"),
        (find_state(namespace_id=ROOM, name=bytes(32)), REFUSED, "'' cannot name a node"),
        (explain(key=b"x"), REFUSED, "first 2 to 32 bytes are needed to explain it, not 1"),
        (explain(key=b"x" * 33), REFUSED, "not 33"),
        (explain(key=b"xxxx", namespace_id=b"x"), REFUSED, "a namespace id is 32 bytes, not 1"),
        (
            heartbeat(added=added(keys=bytes(MAX_MESSAGE_BYTES))),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "larger than max",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(
    stub: control_pb2_grpc.ControlServiceStub, call: Call, code: grpc.StatusCode, text: str
) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        call(stub)

    assert isinstance(failure.value, grpc.Call)
    assert failure.value.code() is code
    assert text in str(failure.value.details())


def test_incarnation_0_is_refused(stub: control_pb2_grpc.ControlServiceStub) -> None:
    request = registration()
    request.incarnation = 0

    with pytest.raises(grpc.RpcError, match="number a node's starts from 1"):
        stub.Register(request, timeout=TIMEOUT_S)


# Starting and stopping


def test_a_second_manager_on_the_same_address_is_refused(server: ManagerServer) -> None:
    second = ManagerServer(ManagerSettings(listen=server.address, store="memory:"))

    with pytest.raises(Refused, match="is another manager there"):
        second.start()
    second.stop()


def test_stop_ends_open_streams_and_may_be_repeated(server: ManagerServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        stub.Register(registration(), timeout=TIMEOUT_S)
        stream = Stream(stub)
        stream.ask(beat(1, KEYS))

        server.stop()
        server.stop()

        with pytest.raises(grpc.RpcError):
            stream.ask(beat(2, []))


def test_each_start_on_a_store_has_a_greater_epoch(tmp_path: Path) -> None:
    settings = ManagerSettings(listen="127.0.0.1:0", store=f"sqlite:{tmp_path / 'm.db'}")
    epochs = []
    for _ in range(3):
        server = ManagerServer(settings)
        server.start()
        epochs.append(server.epoch)
        server.stop()

    assert epochs == [1, 2, 3]


def test_managers_that_start_at_once_get_different_epochs(tmp_path: Path) -> None:
    stores = [SqliteStore(tmp_path / "m.db") for _ in range(4)]
    with ThreadPoolExecutor() as pool:
        epochs = list(pool.map(next_epoch, stores))

    assert sorted(epochs) == [1, 2, 3, 4]
    for store in stores:
        store.close()


def test_an_epoch_that_is_no_number_is_not_guessed() -> None:
    store = MemoryStore()
    store.put(EPOCH_KEY, b"seven")

    with pytest.raises(Broken, match="not a number; restore the store"):
        next_epoch(store)


def test_the_default_store_is_a_file_in_the_runtime_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFABRIC_RUNTIME_DIR", str(tmp_path / "own"))

    settings = ManagerSettings()
    assert settings.store_address() == f"sqlite:{tmp_path}/own/manager.db"
    settings = ManagerSettings(runtime_dir=str(tmp_path / "given"))
    assert settings.store_address() == f"sqlite:{tmp_path}/given/manager.db"


def test_settings_come_from_the_environment_and_bad_ones_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVFABRIC_MANAGER_SILENCE_MS", "1500")
    assert ManagerSettings().silence_ms == 1500

    with pytest.raises(ValidationError, match="must be at least twice heartbeat_ms"):
        ManagerSettings(heartbeat_ms=800)
    with pytest.raises(ValidationError, match="listen"):
        ManagerSettings(listen="nowhere")


def test_the_peer_token_is_made_once_per_store(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "manager.db")
    token = peer_token(store)
    assert len(token) == TOKEN_BYTES
    store.close()
    again = SqliteStore(tmp_path / "manager.db")
    assert peer_token(again) == token
    assert peer_token(MemoryStore()) != token
    again.close()


def test_a_damaged_peer_token_is_not_handed_out() -> None:
    store = MemoryStore()
    store.put(TOKEN_KEY, b"short")
    with pytest.raises(Broken, match="restore the store"):
        peer_token(store)
