"""What heartbeats say: the inventory's changes, and the other books when they changed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvfabric.rpc.v1 import control_pb2
from kvfabric_nodes.metrics import NodeMetrics
from kvfabric_nodes.reporting.reports import HEAT_SHARDS, REPORT_SHARDS, Reports
from kvfabric_nodes.store.arena import Arena
from kvfabric_nodes.store.core import NodeCore

from .conftest import SEGMENT_BYTES, Desk, key


@pytest.fixture
def reports(core: NodeCore) -> Iterator[Reports]:
    arena = Arena(core.extents.segments, SEGMENT_BYTES)
    yield Reports(core, NodeMetrics("n0", 7, core, arena), "n0")
    arena.close()


def tell(
    reports: Reports, *, full: bool = False, regular: bool = True
) -> control_pb2.HeartbeatRequest:
    (message,) = reports.messages(full=full, regular=regular)
    return message


def test_changes_are_told_once_and_a_full_report_tells_all(reports: Reports, desk: Desk) -> None:
    desk.put([key(1), key(2)])
    first = tell(reports)
    assert first.added[0].keys == key(1) + key(2)
    assert (first.node, first.incarnation, first.inventory_count) == ("n0", 7, 2)
    desk.core.purge(desk.session, desk.namespace, [key(1)], "", 0.0)
    second = tell(reports)
    assert (len(second.added), second.removed[0].keys) == (0, key(1))
    third = tell(reports, full=True)
    assert third.full
    assert third.added[0].keys == key(2)


def test_changes_that_were_lost_make_the_next_one_full(reports: Reports, desk: Desk) -> None:
    desk.put([key(1)])
    desk.core.changes_lost = True
    assert tell(reports).full
    assert not tell(reports).full


def test_large_reports_are_cut(
    reports: Reports, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert REPORT_SHARDS > 2
    monkeypatch.setattr("kvfabric_nodes.reporting.reports.REPORT_SHARDS", 2)
    desk.put([key(number) for number in range(5)])
    messages = list(reports.messages(full=True, regular=True))
    assert [message.more for message in messages] == [True, True, False]
    assert [len(message.added[0].keys) // 32 for message in messages] == [2, 2, 1]
    assert [message.HasField("stats") for message in messages] == [False, False, True]
    assert messages[-1].inventory_count == 5


def test_other_books_are_told_when_they_changed_or_in_full(reports: Reports) -> None:
    loans = control_pb2.Loans(loan=[1])
    sequences = control_pb2.Sequences()
    reports.loans = lambda: loans
    reports.sequences = lambda: sequences
    first = tell(reports)
    assert first.HasField("loans")
    assert not first.HasField("sequences")  # none yet, as before
    assert not tell(reports).HasField("loans")
    sequences.sequence.append(5)
    assert tell(reports).sequences.sequence == [5]
    full = tell(reports, full=True)
    assert full.HasField("loans")
    assert full.HasField("sequences")
    loans.Clear()
    last = tell(reports)
    assert last.HasField("loans")  # that there are none any more is news
    assert not last.HasField("sequences")


def test_between_the_regular_ones_only_shards_are_told(reports: Reports, desk: Desk) -> None:
    reports.loans = lambda: control_pb2.Loans(loan=[1])
    reports.rates = lambda: {"n1": 10}
    desk.put([key(1)])
    hurried = tell(reports, regular=False)
    assert hurried.added[0].keys == key(1)
    for name in ("stats", "loans", "heat", "steps"):
        assert not hurried.HasField(name)
    assert not hurried.links
    assert tell(reports).HasField("loans")


def test_what_was_measured_is_told(reports: Reports) -> None:
    measured = [control_pb2.StepSums(steps=3)]
    reports.steps = lambda: measured.pop() if measured else None
    reports.rates = lambda: {"n1": 10, "n2": 20}
    message = tell(reports)
    assert message.steps.steps == 3
    assert [(link.peer, link.bytes_per_s) for link in message.links] == [("n1", 10), ("n2", 20)]
    assert not tell(reports).HasField("steps")


def read(desk: Desk, number: int, times: int) -> None:
    for _ in range(times):
        desk.core.release(desk.session, [desk.lease([key(number)])])


def test_what_was_read_most_is_told_once(reports: Reports, desk: Desk) -> None:
    desk.put([key(number) for number in range(4)])
    for number, times in ((0, 2), (1, 5), (2, 3), (3, 9)):
        read(desk, number, times)
    desk.core.purge(desk.session, desk.namespace, [key(3)], "", 0.0)
    heat = tell(reports).heat
    assert heat.keys == key(1) + key(2)  # twice is not worth telling of
    assert list(heat.reads) == [5, 3]
    assert list(heat.namespace_id) == [desk.namespace] * 2
    read(desk, 1, 1)
    assert not tell(reports).HasField("heat")


def test_only_so_many_hot_shards_are_told(reports: Reports, desk: Desk) -> None:
    count = HEAT_SHARDS + 6
    for start in range(0, count, HEAT_SHARDS):
        desk.put([key(number) for number in range(start, min(count, start + HEAT_SHARDS))], 64)
    for number in range(count):
        read(desk, number, 3 + number)
    reads = list(tell(reports).heat.reads)
    assert reads == sorted(range(3 + 6, 3 + count), reverse=True)


def test_what_another_node_copies_is_not_hot(reports: Reports, desk: Desk) -> None:
    desk.put([key(1)])
    desk.session.between_nodes = True
    read(desk, 1, 10)
    assert not tell(reports).HasField("heat")
