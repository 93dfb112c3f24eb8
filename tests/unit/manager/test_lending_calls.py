"""Loans and plans over real gRPC, the server in this process."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
import pytest

from kvfabric.lending.loans import Loan, LoanState, to_columns
from kvfabric.manager.messages import MAX_HEAT, MAX_LINKS, MAX_LOANS, MAX_SEQUENCES
from kvfabric.manager.service import ManagerServer, ManagerSettings
from kvfabric.rpc.v1 import control_pb2 as pb
from kvfabric.rpc.v1 import control_pb2_grpc, types_pb2

TIMEOUT_S = 20.0
GIB = 1024**3
BLOCK_BYTES = 16 * 1024 * 1024
REFUSED = grpc.StatusCode.INVALID_ARGUMENT
Stub = control_pb2_grpc.ControlServiceStub


@pytest.fixture
def server() -> Iterator[ManagerServer]:
    server = ManagerServer(ManagerSettings(listen="127.0.0.1:0", store="memory:"))
    server.start()
    yield server
    server.check()
    server.stop()


@pytest.fixture
def stub(server: ManagerServer) -> Iterator[Stub]:
    with grpc.insecure_channel(server.address) as channel:
        yield control_pb2_grpc.ControlServiceStub(channel)


def tier(free_bytes: int) -> types_pb2.TierStats:
    return types_pb2.TierStats(
        tier=types_pb2.TIER_DRAM,
        capacity_bytes=64 * GIB,
        held_bytes=64 * GIB - free_bytes,
        claimed_bytes=64 * GIB - free_bytes,
        free_bytes=free_bytes,
    )


def register(stub: Stub, node: str, free_bytes: int) -> None:
    stub.Register(
        pb.RegisterRequest(
            min_version=1,
            max_version=1,
            node=node,
            incarnation=1,
            endpoints=types_pb2.Endpoints(host=f"host of {node}", tcp_address="127.0.0.1:9"),
            tiers=[tier(free_bytes)],
        ),
        timeout=TIMEOUT_S,
    )


def beat(stub: Stub, node: str, sequence: int = 1, **fields: object) -> pb.HeartbeatResponse:
    """One heartbeat on a stream of its own."""
    request = pb.HeartbeatRequest(node=node, incarnation=1, sequence=sequence)
    request.MergeFrom(pb.HeartbeatRequest(**fields))  # type: ignore[arg-type]
    answer: pb.HeartbeatResponse = next(stub.Heartbeat(iter([request]), timeout=TIMEOUT_S))
    return answer


def test_a_debtor_learns_who_could_lend_and_how_to_reach_it(stub: Stub) -> None:
    register(stub, "a", 0)
    register(stub, "b", 20 * GIB)
    request = pb.BorrowRequest(node="a", incarnation=1, size_bytes=GIB)
    answer = stub.Borrow(request, timeout=TIMEOUT_S)
    assert answer == pb.BorrowResponse(
        nodes=["b"],
        endpoints=[types_pb2.Endpoints(host="host of b", tcp_address="127.0.0.1:9")],
        free_bytes=[20 * GIB],
    )
    request.exclude.append("b")
    answer = stub.Borrow(request, timeout=TIMEOUT_S)
    assert not answer.nodes
    assert "1 refused" in answer.reason


def test_the_ledger_has_both_sides_and_so_have_the_nodes(stub: Stub) -> None:
    loan = Loan(3, "a", 1, "b", 1, LoanState.HELD, 5 * BLOCK_BYTES)
    columns = to_columns([loan])
    for node in ("a", "b"):
        register(stub, node, GIB)
        beat(stub, node, loans=columns)

    answer = stub.Ledger(pb.LedgerRequest(), timeout=TIMEOUT_S)
    assert answer == pb.LedgerResponse(
        lent=columns,
        borrowed=columns,
        lent_bytes=5 * BLOCK_BYTES,
        borrowed_bytes=5 * BLOCK_BYTES,
    )
    nodes = {each.node: each for each in stub.ListNodes(pb.ListNodesRequest()).nodes}
    assert (nodes["a"].lent_bytes, nodes["a"].borrowed_bytes) == (0, 5 * BLOCK_BYTES)
    assert (nodes["b"].lent_bytes, nodes["b"].borrowed_bytes) == (5 * BLOCK_BYTES, 0)
    stats = stub.Stats(pb.ControlServiceStatsRequest(), timeout=TIMEOUT_S)
    counters = {counter.name: counter.value for counter in stats.counters}
    assert counters['kvfabric_manager_loans{state="held"}'] == 1
    assert counters["kvfabric_manager_lent_bytes"] == 5 * BLOCK_BYTES
    assert counters["kvfabric_manager_borrowed_bytes"] == 5 * BLOCK_BYTES


def test_the_server_plans_by_itself_and_its_command_comes_with_a_heartbeat(stub: Stub) -> None:
    register(stub, "a", 0)
    register(stub, "b", 60 * GIB)
    sequences = pb.Sequences(
        sequence=[7],
        namespace_id=[b"r" * 32],
        tokens=[128 * 1000],
        local_bytes=[1000 * BLOCK_BYTES],
        remote_bytes=[0],
        block_bytes=[BLOCK_BYTES],
    )
    command, number = None, 0
    deadline_s = time.monotonic() + TIMEOUT_S
    while command is None and time.monotonic() < deadline_s:
        number += 1
        answer = beat(
            stub,
            "a",
            number,
            sequences=sequences,
            stats=types_pb2.NodeStats(tiers=[tier(0)]),
            steps=pb.StepSums(waiting=9, last_batch=2),
        )
        command = next(iter(answer.commands), None)
    assert command is not None
    assert command.lend_out.sequence == 7
    assert command.lend_out.creditor == "b"
    assert command.lend_out.endpoints.tcp_address == "127.0.0.1:9"

    (plan,) = stub.ListPlans(pb.ListPlansRequest(), timeout=TIMEOUT_S).plans
    assert (plan.debtor, plan.creditor, plan.sequence) == ("a", "b", 7)
    assert plan.size_bytes == command.lend_out.size_bytes
    assert plan.why == command.why
    stats = stub.Stats(pb.ControlServiceStatsRequest(), timeout=TIMEOUT_S)
    counters = {counter.name: counter.value for counter in stats.counters}
    assert counters["kvfabric_manager_plans_total"] == 1
    assert counters["kvfabric_manager_plan_seconds_count"] >= 1


def test_replicas_near_the_asker_come_first(stub: Stub) -> None:
    key = b"k" * 32
    for node in ("a", "b", "c"):
        register(stub, node, GIB)
    for node in ("b", "c"):
        beat(
            stub,
            node,
            added=[
                pb.Inventory(
                    namespace_id=b"r" * 32, tier=types_pb2.TIER_DRAM, keys=key, size_bytes=[8]
                )
            ],
            inventory_count=1,
            inventory_hash=int.from_bytes(key[:8], "little"),
        )
    asked = pb.LocateRequest(namespace_id=b"r" * 32, keys=[key])
    for asker, expected in (("", ["b", "c"]), ("c", ["c", "b"]), ("a", ["b", "c"])):
        asked.node = asker
        assert stub.Locate(asked, timeout=TIMEOUT_S).places[0].nodes == expected


def borrow(**fields: object) -> pb.BorrowRequest:
    request = pb.BorrowRequest(node="a", incarnation=1, size_bytes=1)
    request.MergeFrom(pb.BorrowRequest(**fields))  # type: ignore[arg-type]
    return request


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (pb.BorrowRequest(node="a", incarnation=1), REFUSED, "0 bytes cannot be borrowed"),
        (borrow(node="../a"), REFUSED, "cannot name a node"),
        (borrow(exclude=[""]), REFUSED, "cannot name a node"),
        (borrow(incarnation=9), grpc.StatusCode.ABORTED, "a/9 is not registered here; register"),
        (borrow(exclude=["b"] * 4097), REFUSED, "4097 nodes are over 4096"),
    ],
)
def test_who_asks_wrongly_is_told_what_to_mend(
    stub: Stub, request_: pb.BorrowRequest, code: grpc.StatusCode, text: str
) -> None:
    register(stub, "a", GIB)
    with pytest.raises(grpc.RpcError) as failure:
        stub.Borrow(request_, timeout=TIMEOUT_S)
    assert isinstance(failure.value, grpc.Call)
    assert failure.value.code() is code
    assert text in str(failure.value.details())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"loans": pb.Loans(loan=[1])}, "a column of 0 for 1 loans"),
        ({"loans": pb.Loans(loan=[1] * (MAX_LOANS + 1))}, f"are over {MAX_LOANS}"),
        (
            {
                "loans": pb.Loans(
                    loan=[1],
                    debtor=["a"],
                    debtor_incarnation=[1],
                    creditor=["b"],
                    creditor_incarnation=[1],
                    state=[99],
                    size_bytes=[1],
                )
            },
            "[99] are no states of loans",
        ),
        ({"sequences": pb.Sequences(sequence=[1, 2], tokens=[1])}, "for 2 sequences"),
        (
            {"sequences": pb.Sequences(sequence=[1] * (MAX_SEQUENCES + 1))},
            f"are over {MAX_SEQUENCES}",
        ),
        ({"heat": pb.Heat(keys=b"x")}, "1 bytes of keys are no multiple of 32"),
        ({"heat": pb.Heat(keys=bytes(32))}, "for 1 hot shards"),
        ({"heat": pb.Heat(keys=bytes(32 * (MAX_HEAT + 1)))}, f"are over {MAX_HEAT}"),
        ({"links": [pb.Link()] * (MAX_LINKS + 1)}, f"are over {MAX_LINKS}"),
    ],
)
def test_a_heartbeat_whose_columns_do_not_fit_is_refused(
    stub: Stub, fields: dict[str, object], text: str
) -> None:
    register(stub, "a", GIB)
    with pytest.raises(grpc.RpcError) as failure:
        beat(stub, "a", 1, **fields)
    assert isinstance(failure.value, grpc.Call)
    assert failure.value.code() is REFUSED
    assert text in str(failure.value.details())
