"""What happens while a kernel reads: its blocks go, its sequence is cut, its caller leaves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.unit.client.conftest import Start, address, core_of, counter
from tests.unit.client.test_deadlines import eventually
from tests.unit.nodes.attention.asking import (
    Asker,
    Call,
    Query,
    asker,
    check,
    ids,
    kv,
    opening,
    rows,
    space,
)
from tests.unit.nodes.attention.slow import TIMEOUT_S, Gate

from kvfabric.errors import Broken, Conflict, Refused, Retry
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Format
from kvfabric.wire.connection import Connection
from kvfabric_client import Sequence
from kvfabric_nodes.attention import engine
from kvfabric_nodes.node import Node

FORM = Format("float32", block_tokens=16, layers=2, kv_heads=2, head_dim=8)
CONTEXT = kv(FORM, 40)


@pytest.fixture
def node(gate: Gate, start: Start) -> Node:
    """With room for little more than one sequence: what is given back is soon used again."""
    return start(memory=1 << 20, segment=64 << 10)


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def appended(ask: Asker) -> Sequence:
    sequence = ask.room.sequence(FORM)
    sequence.append(ids(40), CONTEXT)
    return sequence


def refill(ask: Asker) -> None:
    """Writes all memory that the node has to give."""
    other, number = ask.room.sequence(FORM), 100
    try:
        while number < 1 << 20:
            number += 1
            other.append(ids(160, seed=number), np.full((2, 2, 2, 160, 8), 1e3, np.float32))
    except Retry:  # it is full
        other.close(drop=True)
    assert number > 102


def test_blocks_that_are_purged_stay_under_the_kernel(
    ask: Asker, node: Node, gate: Gate, thread: ThreadPoolExecutor
) -> None:
    sequence = appended(ask)
    call = Call(FORM, [Query(ask.span_of(FORM, sequence.id), rows(FORM, 1), 40, CONTEXT)])
    with gate.closed():
        answer = thread.submit(ask.attend, call)
        gate.reached()
        sequence.truncate(40)  # cuts nothing
        ask.room.purge()
        assert core_of(node).books().quarantined_bytes
        refill(ask)
        node.check()
    check(answer.result(TIMEOUT_S), call)
    assert eventually(lambda: not core_of(node).books().quarantined_bytes)
    again = ask.attend(call)
    assert [(gap.first_token, gap.end_token) for gap in again.gaps] == [(0, 32)]
    sequence.close()


@pytest.mark.parametrize("how", ["close", "truncate", "accept"])
def test_open_blocks_that_are_given_up_are_no_wrong_number(
    ask: Asker, node: Node, gate: Gate, thread: ThreadPoolExecutor, how: str
) -> None:
    sequence = appended(ask)
    fork = sequence.fork(tentative=True)
    fork.append(ids(1), kv(FORM, 1))
    changes: dict[str, Callable[[], object]] = {
        "close": lambda: sequence.close(drop=True),
        "truncate": lambda: sequence.truncate(35),
        "accept": lambda: sequence.accept(fork),  # whose open blocks become the sequence's
    }
    asked = fork if how == "accept" else sequence
    call = Call(FORM, [Query(ask.span_of(FORM, asked.id), rows(FORM, 1), 40, CONTEXT)])
    with gate.closed():
        answer = thread.submit(ask.attend, call)
        gate.reached()
        changes[how]()
        refill(ask)
        node.check()
    with pytest.raises(Conflict, match="cut or ended"):
        answer.result(TIMEOUT_S)
    sequence.close(drop=True)
    assert eventually(lambda: not core_of(node).books().quarantined_bytes)


def test_a_tail_that_is_appended_to_and_sealed_meanwhile_is_attended_as_it_was(
    ask: Asker, node: Node, gate: Gate, thread: ThreadPoolExecutor
) -> None:
    sequence = appended(ask)
    call = Call(FORM, [Query(ask.span_of(FORM, sequence.id), rows(FORM, 1), 40, CONTEXT)])
    with gate.closed():
        answer = thread.submit(ask.attend, call)
        gate.reached()
        sequence.append(ids(60, seed=3), kv(FORM, 60, seed=3))
        assert sequence.sealed == 96
        node.check()
    check(answer.result(TIMEOUT_S), call)
    node.check()
    check(ask.attend(call), call)
    sequence.close(drop=True)
    assert eventually(lambda: not core_of(node).books().quarantined_bytes)


def test_a_caller_that_goes_away_leaves_nothing_behind(ask: Asker, node: Node, gate: Gate) -> None:
    sequence = appended(ask)
    with contextlib.closing(Connection(address(node, "tcp"), _soon())) as other:
        hello = node_pb2.HelloRequest(min_version=1, max_version=1, namespaces=[space()])
        other.call("hello", hello, _soon())
        opened = other.call("open_span", opening(ask.room.id, FORM, sequence.id), _soon())
        span = opened.open_span_response.span
        call = Call(FORM, [Query(span, rows(FORM, 1), 40, CONTEXT)])
        with gate.closed():
            for _ in range(3):
                other.begin("attend", call.message(), _soon())
            gate.reached()
            assert eventually(lambda: len(core_of(node)._readings) == 3)
            other.close()
            sequence.close(drop=True)
            node.check()
    assert eventually(lambda: not core_of(node)._readings)
    assert eventually(lambda: not core_of(node).books().quarantined_bytes)
    assert len(gate.works) == 1
    node.check()


def test_what_waits_past_its_deadline_is_not_computed(
    ask: Asker, node: Node, gate: Gate, thread: ThreadPoolExecutor
) -> None:
    with appended(ask) as sequence:
        span = ask.span_of(FORM, sequence.id)
        first = Call(FORM, [Query(span, rows(FORM, 1), 40, CONTEXT)])
        late = Call(FORM, [Query(span, rows(FORM, 5), 40, CONTEXT)], deadline_ms=1)
        with gate.closed():
            answer = thread.submit(ask.attend, first)
            gate.reached()
            refused = thread.submit(ask.attend, late)
            assert eventually(lambda: len(core_of(node)._readings) == 2)
            passed_s = time.monotonic() + 0.002
            assert eventually(lambda: time.monotonic() > passed_s)
        check(answer.result(TIMEOUT_S), first)
        with pytest.raises(Retry, match="deadline passed"):
            refused.result(TIMEOUT_S)
        assert all(work.rows == 1 for work in gate.works)


def test_what_waits_for_the_same_blocks_is_computed_together(
    ask: Asker, node: Node, gate: Gate, thread: ThreadPoolExecutor
) -> None:
    with appended(ask) as sequence, sequence.fork(32) as fork:
        own = kv(FORM, 4, seed=9)
        fork.append(ids(4, seed=9), own)
        context = np.concatenate([CONTEXT[..., :32, :], own], axis=-2)
        spans = [ask.span_of(FORM, one.id) for one in (sequence, fork)]
        calls = [
            Call(FORM, [Query(spans[0], rows(FORM, 1, seed=1), 40, CONTEXT)]),
            Call(FORM, [Query(spans[1], rows(FORM, 2, seed=2), 36, context, [34, 35])]),
            Call(FORM, [Query(spans[1], rows(FORM, 1, seed=2), 36, context)], layer=1),
        ]
        with gate.closed():
            first = thread.submit(ask.attend, calls[0])
            gate.reached()
            answers = [thread.submit(ask.attend, call) for call in calls]
            assert eventually(lambda: len(core_of(node)._readings) == 4)
        for call, answer in zip(calls, answers, strict=True):
            check(answer.result(TIMEOUT_S), call)
        check(first.result(TIMEOUT_S), calls[0])
        assert [answer.result().stacked for answer in answers] == [2, 2, 1]
        computed = sorted((work.rows, int(work.tokens.sum())) for work in gate.works)
        assert computed == [(1, 8), (1, 36), (1, 40), (2, 4), (3, 32)]


def test_more_than_may_wait_are_told_to_come_again(
    ask: Asker,
    node: Node,
    gate: Gate,
    thread: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "MAX_WAITING", 2)
    with appended(ask) as sequence:
        call = Call(FORM, [Query(ask.span_of(FORM, sequence.id), rows(FORM, 1), 40, CONTEXT)])
        with gate.closed():
            answers = [thread.submit(ask.attend, call)]
            gate.reached()
            answers += [thread.submit(ask.attend, call) for _ in range(2)]
            assert eventually(lambda: len(core_of(node)._readings) == 3)
            with pytest.raises(Retry, match="2 calls wait"):
                ask.attend(call)
        for answer in answers:
            check(answer.result(TIMEOUT_S), call)
        refused = 'kvfabric_node_attend_refusals_total{reason="full"}'
        assert counter(ask.client, refused) == 1


def test_a_kernel_that_fails_is_told_and_the_next_call_is_computed(
    ask: Asker, node: Node, gate: Gate
) -> None:
    with appended(ask) as sequence:
        call = Call(FORM, [Query(ask.span_of(FORM, sequence.id), rows(FORM, 1), 40, CONTEXT)])
        gate.error = MemoryError("no scratch")
        with pytest.raises(Broken, match="no scratch"):
            ask.attend(call)
        gate.error = None
        check(ask.attend(call), call)
        assert not core_of(node)._readings


def test_what_fails_together_is_computed_one_by_one(
    ask: Asker, node: Node, gate: Gate, thread: ThreadPoolExecutor
) -> None:
    gate.most_rows = 2
    with appended(ask) as sequence:
        span = ask.span_of(FORM, sequence.id)
        sizes = (1, 1, 3, 2)
        calls = [Call(FORM, [Query(span, rows(FORM, n), 40, CONTEXT)]) for n in sizes]
        with gate.closed():
            answers = [thread.submit(ask.attend, calls[0])]
            gate.reached()
            answers += [thread.submit(ask.attend, call) for call in calls[1:]]
            assert eventually(lambda: len(core_of(node)._readings) == len(calls))
        for answer, call in zip(answers, calls, strict=True):
            if len(call.queries[0].vectors) == 3:
                with pytest.raises(Broken, match="no scratch"):
                    answer.result(TIMEOUT_S)
            else:
                check(answer.result(TIMEOUT_S), call)
        assert not core_of(node)._readings


def test_spans_end_with_their_session(node: Node, ask: Asker) -> None:
    with appended(ask) as sequence:
        with asker(address(node, "tcp")) as other:
            span = other.span_of(FORM, sequence.id)
            with pytest.raises(Refused, match=f"no span {span}"):
                ask.attend(Call(FORM, [Query(span, rows(FORM, 1), 40, CONTEXT)]))
        assert eventually(lambda: not node.attention.spans.count)


def _soon() -> float:
    return time.monotonic() + TIMEOUT_S
