"""The keeper's process, what it is told and in which order, and nodes that it outlives."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.nodes.conftest import Desk, key

from kvfabric.errors import Conflict, Refused
from kvfabric.types import Key, Namespace, Status
from kvfabric_client import connect
from kvfabric_nodes.keeper import client, process, records
from kvfabric_nodes.keeper.client import Held, KeeperLink, take_over
from kvfabric_nodes.keeper.guests import Guests, gone, guests_of
from kvfabric_nodes.keeper.outbox import Outbox
from kvfabric_nodes.keeper.process import Inbox, Op
from kvfabric_nodes.keeper.records import Guest
from kvfabric_nodes.node import Node
from kvfabric_nodes.settings import NodeSettings
from kvfabric_nodes.store.arena import Arena
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extents
from kvfabric_nodes.store.promises import Session
from kvfabric_nodes.store.shards import Shard

KEEP_S = 30.0
DEADLINE_S = 20.0
MEMORY = 4 << 20
SPACE = Namespace("default", bytes(32), b"keeper")


def until(what: Callable[[], object], why: str) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < end_s, f"not in time: {why}"
        time.sleep(0.005)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where a keeper may listen. None is left behind."""
    tmp_path.chmod(0o700)
    path = tmp_path / "n0.keeper"
    yield path
    if path.exists():
        link, held = take_over("n0", path, KEEP_S)
        held.close()
        link.end()
    assert not path.exists()


@pytest.fixture
def take(path: Path) -> Callable[[], tuple[KeeperLink, Held]]:
    return lambda: take_over("n0", path, KEEP_S)


Take = Callable[[], tuple[KeeperLink, Held]]


def memory_of(text: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, text)
    return fd


# The process ----------------------------------------------------------------------------


def test_what_one_rmanager_said_the_next_one_hears(take: Take) -> None:
    link, held = take()
    assert held == Held({}, {})
    fd = memory_of(b"bytes")
    link.send(process.packed(Op.SEGMENT, process.SEGMENT.pack(7)), fd)
    os.close(fd)
    for number in range(3000):
        name = str(number).encode()
        assert link.send(process.put(name, name * 20))
        if number % 2:
            assert link.send(process.packed(Op.DELETE, name))
    half = process.put(b"half", b"never sent to its end")
    link.send(half[:-1])
    link.close()

    again, held = take()
    assert again.pid == link.pid
    names = [str(number).encode() for number in range(0, 3000, 2)]
    assert held.table == {name: name * 20 for name in names}
    assert list(held.table) == names, "in the order in which it came"
    assert os.pread(held.segments[7], 5, 0) == b"bytes"
    held.close()
    again.send(process.packed(Op.CLOSE, process.SEGMENT.pack(7)))
    again.close()
    third, held = take()
    assert held.segments == {}
    third.end()


def test_what_a_process_sent_before_it_was_killed_is_kept(take: Take, path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from kvfabric_nodes.keeper import process\n"
        "from kvfabric_nodes.keeper.client import take_over\n"
        "link, _ = take_over('n0', Path(sys.argv[1]), 30)\n"
        "for n in range(1000): link.send(process.put(str(n).encode(), bytes(100)))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    link, held = take()
    assert len(held.table) == 1000
    link.end()


def test_a_keeper_is_nobodys_child_and_small(take: Take) -> None:
    link, _ = take()
    stat = Path(f"/proc/{link.pid}/stat").read_text().rpartition(")")[2].split()
    assert int(stat[1]) != os.getpid(), "its parent"
    assert int(stat[3]) == link.pid, "a session of its own: no signal to ours reaches it"
    status = Path(f"/proc/{link.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    assert int(line.split()[1]) < 20_000
    link.end()


def test_only_one_rmanager_at_a_time(take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    link, _ = take()
    link.send(process.put(b"key", b"record"))
    monkeypatch.setattr(client, "OTHER_ENDS_S", 0.2)
    with pytest.raises(Conflict, match=f"process {os.getpid()} is this node's rManager"):
        take()
    link.send(process.put(b"more", b"record"))  # the first one does not notice
    link.close()
    again, held = take()
    assert held.table.keys() == {b"key", b"more"}
    again.end()


def test_an_rmanager_that_is_about_to_end_is_waited_for(take: Take) -> None:
    link, _ = take()
    late = threading.Timer(0.3, link.close)
    late.start()
    again, _ = take()
    late.join()
    again.end()


def test_a_keeper_to_which_nobody_comes_ends(path: Path) -> None:
    link, _ = take_over("n0", path, 0.1)
    link.close()
    until(lambda: not path.exists(), "it ends and leaves no socket")


@pytest.mark.parametrize(
    "garbage",
    [
        process.HEADER.pack(99, 0),
        process.HEADER.pack(Op.PUT, process.MAX_BODY_BYTES + 1),
        process.packed(Op.PUT, b""),
        process.packed(Op.SEGMENT, process.SEGMENT.pack(1)),  # no descriptor beside it
        process.packed(Op.DONE),
    ],
)
def test_what_is_not_understood_ends_it_rather_than_being_kept(
    take: Take, path: Path, garbage: bytes
) -> None:
    link, _ = take()
    link.send(process.put(b"key", b"record") + garbage)
    until(lambda: not path.exists(), "it ends")
    link.close()
    again, held = take()
    assert held.table == {}
    again.end()


def test_somebody_who_only_looks_is_no_rmanager(take: Take, path: Path) -> None:
    link, _ = take()
    link.send(process.put(b"key", b"record"))
    link.close()
    for said in (b"", b"nonsense, nonsense"):
        with socket.socket(socket.AF_UNIX) as looks:
            looks.connect(str(path))
            looks.send(said)
    again, held = take()
    assert held.table.keys() == {b"key"}
    again.end()


def test_a_keeper_that_is_stopped_is_not_waited_for(
    take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, _ = take()
    link.close()
    os.kill(link.pid, signal.SIGSTOP)
    monkeypatch.setattr(client, "ANSWER_S", 0.2)
    again, held = take()
    assert again.pid != link.pid
    assert held == Held({}, {})
    again.end()


def test_a_keeper_that_was_too_slow_once_keeps_what_it_has(
    take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, _ = take()
    link.send(process.put(b"key", b"record"))
    link.close()
    slow = iter((TimeoutError(), ConnectionAbortedError()))

    real = client._receive_all

    def receive_all(sock: socket.socket) -> Held:
        if (error := next(slow, None)) is not None:
            raise error
        return real(sock)

    monkeypatch.setattr(client, "_receive_all", receive_all)
    again, held = take()
    assert again.pid == link.pid
    assert held.table.keys() == {b"key"}
    again.end()


def test_a_keeper_without_descriptors_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, Any]:
            raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(process, "ACCEPT_PAUSE_S", 0.0)
    with Listener(socket.AF_UNIX) as listener:
        keeper = process.Keeper(listener, KEEP_S)
        keeper.table[b"key"] = b"record"
        keeper._admit()
        assert keeper.table == {b"key": b"record"}


def test_an_inbox_takes_pieces_of_any_size() -> None:
    said = process.put(b"key", b"record") + process.packed(Op.DELETE, b"key")
    for size in range(1, len(said) + 1):
        left, right = socket.socketpair()
        with left, right:
            inbox, heard = Inbox(), list[tuple[Op, bytes]]()
            for start in range(0, len(said), size):
                left.sendall(said[start : start + size])
                assert inbox.receive(right)
                heard += inbox.operations()
        assert [op for op, _ in heard] == [Op.PUT, Op.DELETE]


# What it is told, and when ---------------------------------------------------------------


class Desks:
    """A core whose changes go to a keeper, without a node."""

    def __init__(self, link: KeeperLink) -> None:
        self.core = NodeCore(Extents(4, 1 << 20))
        self.desk = Desk(self.core)
        self.lost: list[str] = []
        self.outbox = Outbox(asyncio.get_running_loop(), link, _kept, self.lost.append)
        self.core.on_sealed.append(lambda shard, _: self.outbox.sealed(shard))
        self.core.on_dropped.append(lambda shard, *_: self.outbox.dropped(shard))

    def slots(self) -> dict[bytes, bytes]:
        return {_slot(shard): shard.key for shard in self.core.shards}


def _kept(shard: Shard) -> bytes:
    """The operation that has a keeper keep the shard's key at its place."""
    return process.put(_slot(shard), shard.key)


def _slot(shard: Shard) -> bytes:
    return records.slot_key(shard.extent.segment, shard.extent.offset)


async def eventually(what: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not what():  # noqa: ASYNC110  # what is awaited is another process
            await asyncio.sleep(0.002)


def test_what_was_dropped_is_out_before_its_place_is_granted_and_the_rest_follows(
    take: Take,
) -> None:
    async def run() -> dict[bytes, bytes]:
        link, _ = take()
        desks = Desks(link)
        desks.desk.put([key(n) for n in range(2000)])
        desks.core.purge(desks.desk.session, desks.desk.namespace, [key(0)], "", 0.0)
        desks.outbox.push()
        assert not desks.outbox._dropped
        assert not desks.outbox._queue
        assert desks.outbox._sealed, "records wait a moment"
        await eventually(lambda: desks.outbox.empty)
        expected = desks.slots()
        desks.outbox.close().close()
        assert not desks.lost
        return expected

    expected = asyncio.run(run())
    link, held = take()
    assert held.table == expected
    link.end()


def test_a_new_keeper_hears_everything_while_it_changes(take: Take) -> None:
    async def run() -> dict[bytes, bytes]:
        link, _ = take()
        desks = Desks(link)
        desks.outbox._open = False  # not yet there
        desks.desk.put([key(n) for n in range(3000)])
        desks.outbox._open = True
        desks.outbox._sealed.clear()
        desks.outbox.all_of(desks.core.shards)
        desks.outbox.flush()  # the rest goes in the rounds of the loop
        assert not desks.outbox.empty
        for number in range(40):
            await asyncio.sleep(0)
            first = number * 20
            gone = [key(n) for n in range(first, first + 10)]
            desks.core.purge(desks.desk.session, desks.desk.namespace, gone, "", 0.0)
            desks.desk.put([key(n) for n in range(5000 + first, 5010 + first)])
            desks.outbox.push()
        await eventually(lambda: desks.outbox.empty)
        expected = desks.slots()
        desks.outbox.close().close()
        return expected

    expected = asyncio.run(run())
    link, held = take()
    assert held.table == expected
    link.end()


def test_a_keeper_that_does_not_take_what_must_be_out_is_made_to_forget(
    take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SEND_BUFFER_BYTES", 128 << 10)

    async def run() -> None:
        link, _ = take()
        desks = Desks(link)
        os.kill(link.pid, signal.SIGSTOP)
        await eventually(lambda: not _running(link.pid))
        rounds = 0
        while not desks.lost:
            numbers = range(rounds * 1000, (rounds + 1) * 1000)
            desks.desk.put([key(n) for n in numbers])
            await asyncio.sleep(0)  # the loop is never held up
            assert not desks.lost, "records of sealed shards can wait"
            purged = desks.core.purge(desks.desk.session, desks.desk.namespace, [], "", 0.0)
            assert purged[0] == 1000
            desks.outbox.push()
            rounds += 1
            assert rounds < 10_000
        assert desks.lost == ["it does not keep up"]
        await eventually(lambda: not _alive(link.pid))

    asyncio.run(run())
    link, held = take()
    assert held.table == {}
    link.end()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _running(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T"


def test_the_end_of_a_keeper_is_noticed(take: Take) -> None:
    async def run() -> None:
        link, _ = take()
        desks = Desks(link)
        os.kill(link.pid, signal.SIGKILL)
        await eventually(lambda: desks.lost)
        desks.desk.put([key(1)])
        desks.outbox.push()
        assert desks.lost == ["it ended"]

    asyncio.run(run())


# Guests -----------------------------------------------------------------------------------


class Table(dict[bytes, bytes]):
    """A keeper's, as far as guests are concerned."""

    def put(self, name: bytes, record: bytes) -> None:
        self[name] = record

    def delete(self, name: bytes) -> None:
        self.pop(name, None)


def test_a_segment_is_free_when_its_last_guest_is_gone() -> None:
    core = NodeCore(Extents(2, 4096))
    sessions = {1: core.open_session("a", "a"), 2: core.open_session("a", "a")}
    here, there = Guest(b"h" * 16, 1, 10, 1), Guest(b"t" * 16, 1, 11, 1)
    both = Guest(b"h" * 16, 2, 10, 1)
    ended: set[int] = set()
    closed: list[Session] = []
    guests = Guests([here, there, both], sessions, closed.append, lambda g: g.pid in ended)
    table = Table({records.guest_key(each): b"" for each in (here, there, both)})

    guests.look(table)
    guests.ended_before([b"x" * 16], table)
    assert (len(table), closed, guests.frozen) == (3, [], 2)
    guests.ended_before([here.token], table)
    assert ([*table], closed) == ([records.guest_key(there)], [sessions[2]])
    ended.add(11)
    guests.look(table)
    assert (table, closed, guests.frozen) == ({}, [sessions[2], sessions[1]], 0)


def test_a_process_is_looked_at_once_however_many_segments_it_maps() -> None:
    guests_of_two = [Guest(b"h" * 16, n, pid, 1) for n in range(1, 9) for pid in (10, 11)]
    looked: list[int] = []

    def is_gone(guest: Guest) -> bool:
        looked.append(guest.pid)
        return guest.pid == 10

    guests = Guests(guests_of_two, {}, lambda session: None, is_gone)
    guests.look(Table({records.guest_key(each): b"" for each in guests_of_two}))
    assert sorted(looked) == [10, 11]
    assert {guest.pid for guest in guests.all()} == {11}


def test_guests_of_now_come_and_go_by_their_sessions() -> None:
    guests, table = Guests([], {}, lambda _: None), Table()
    mine, other = b"m" * 16, b"o" * 16
    guests.mapped(guests_of(mine, os.getpid(), [1, 2]), table)
    guests.mapped(guests_of(other, os.getpid(), [1]), table)
    assert len(table) == len(guests.all()) == 3
    guests.unmapped(mine, [2], table)
    guests.ended(other, table)
    (left,) = guests.all()
    assert (left.token, left.segment) == (mine, 1)
    assert table.keys() == {records.guest_key(left)}
    guests.ended_before([mine], table)
    assert guests.all() == [left], "sessions of this start end with their sockets"


def test_a_process_is_gone_when_another_has_its_number() -> None:
    (me,) = guests_of(b"m" * 16, os.getpid(), [1])
    assert not gone(me)
    assert gone(Guest(me.token, 1, me.pid, me.started_ticks - 1))
    with subprocess.Popen(["sleep", "60"]) as child:
        (guest,) = guests_of(b"c" * 16, child.pid, [1])
        assert not gone(guest)
        child.kill()
        until(lambda: gone(guest), "also while it waits to be reaped")
    assert gone(guest)
    assert not gone(Guest(b"n" * 16, 1, 0, 0)), "a process that is not visible may be there"


# Nodes ------------------------------------------------------------------------------------


def node_at(path: Path, **settings: Any) -> Node:
    options = {"memory": MEMORY, "metrics": "", "grpc": "", "tcp": "", "keep_s": KEEP_S}
    node = Node(
        NodeSettings(node="n0", runtime_dir=path.parent, **{**options, **settings}), keeper=True
    )
    node.start()
    return node


def home(node: Node) -> str:
    return f"unix:{node.settings.unix_path}"


def keys_of(count: int) -> list[Key]:
    return [key(number) for number in range(count)]


def content(name: Key) -> bytes:
    return bytes([name[0]]) * 50_000


def counter(node: Node, name: str) -> float:
    with connect(home(node)) as asking:
        return {c.name: c.value for c in asking.stats().counters}.get(name, 0.0)


def test_an_orderly_stop_ends_the_keeper_too(path: Path) -> None:
    node = node_at(path)
    assert path.exists()
    node.stop()
    assert not path.exists()


def test_a_keeper_may_be_left_for_the_next_version(path: Path) -> None:
    node = node_at(path, keep_on_stop=True)
    with connect(home(node)) as writer:
        room = writer.open(SPACE)
        assert set(room.put(keys_of(20), [content(k) for k in keys_of(20)])) == {Status.OK}
        room.pin(keys_of(2))
        assert room.get(keys_of(1))[0] is not None
    node.stop()
    assert path.exists()

    again = node_at(path)
    with connect(home(again)) as reader:
        room = reader.open(SPACE)
        copies = room.get(keys_of(20))
        assert [copy is not None and copy.tobytes() for copy in copies] == [
            content(k) for k in keys_of(20)
        ]
        assert reader.stats().pins == 2
        events = room.explain(key(0))
        assert [event.what for event in events] == ["adopted"]
        assert room.put([key(30)], [content(key(30))]) == [Status.OK]
    again.check()
    assert counter(again, "kvfabric_node_adopted_shards_total") == 20
    again.stop()


def test_a_start_that_fails_leaves_what_was_there_to_the_next(path: Path) -> None:
    node = node_at(path, keep_on_stop=True)
    with connect(home(node)) as writer:
        writer.open(SPACE).put(keys_of(3), [content(k) for k in keys_of(3)])
    node.stop()
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, pytest.raises(Refused, match="choose another address"):
        node_at(path, tcp=f"127.0.0.1:{taken.getsockname()[1]}")
    again = node_at(path)
    with connect(home(again)) as reader:
        assert all(copy is not None for copy in reader.open(SPACE).get(keys_of(3)))
    again.stop()


def test_a_start_that_finds_no_memory_leaves_what_was_there_to_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = node_at(path, keep_on_stop=True)
    with connect(home(node)) as writer:
        writer.open(SPACE).put(keys_of(3), [content(k) for k in keys_of(3)])
    node.stop()

    def no_memory(*_: object) -> Arena:
        raise OSError(errno.ENOMEM, "cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr("kvfabric_nodes.node.Arena", no_memory)
        with pytest.raises(Refused, match="give it less memory"):
            node_at(path)
    again = node_at(path)
    with connect(home(again)) as reader:
        assert all(copy is not None for copy in reader.open(SPACE).get(keys_of(3)))
    again.stop()


@pytest.mark.parametrize("change", [{"memory": 2 * MEMORY}, {"segment": MEMORY // 4}])
def test_a_node_of_another_shape_begins_with_nothing(path: Path, change: dict[str, int]) -> None:
    node = node_at(path, keep_on_stop=True)
    with connect(home(node)) as writer:
        writer.open(SPACE).put(keys_of(1), [content(key(0))])
    node.stop()
    again = node_at(path, **change)
    with connect(home(again)) as reader:
        room = reader.open(SPACE)
        assert room.get(keys_of(1)) == [None]
        assert room.put(keys_of(1), [content(key(0))]) == [Status.OK]
    name = 'kvfabric_node_unadopted_shards_total{reason="other shape"}'
    assert counter(again, name) == 1
    again.check()
    again.stop()
    assert not path.exists()


def test_a_keeper_that_dies_is_replaced_and_the_new_one_knows_everything(
    path: Path, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfabric_nodes.keeper.keeping.RESTART_S", 0.01)
    node = node_at(path, keep_on_stop=True)
    with connect(home(node)) as writer:
        room = writer.open(SPACE)
        room.put(keys_of(10), [content(k) for k in keys_of(10)])
        os.kill(_keeper_at(path), signal.SIGKILL)
        until(lambda: counter(node, "kvfabric_node_keeper_losses_total") == 1, "it is noticed")
        until(lambda: counter(node, "kvfabric_node_keeper") == 1, "another is started")
        room.put([key(11)], [content(key(11))])
        node.stop()
    link, held = take()
    state = records.read(held.table)
    assert {record.key for record in state.shards} == {*keys_of(10), key(11)}
    assert state.shape is not None
    assert len(held.segments) == state.shape.segments
    assert {g.pid for g in state.guests} == {os.getpid()}
    held.close()
    link.end()


def test_two_nodes_cannot_have_one_keeper(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "OTHER_ENDS_S", 0.2)
    node = node_at(path)
    with pytest.raises(Conflict, match="another rManager has the memory of node n0"):
        node_at(path)
    with connect(home(node)) as writer:
        assert writer.open(SPACE).put(keys_of(1), [content(key(0))]) == [Status.OK]
    assert counter(node, "kvfabric_node_keeper") == 1
    node.stop()


def test_a_client_that_lets_go_gives_the_segments_back_and_one_that_looks_on_does_not(
    path: Path,
) -> None:
    node = node_at(path, keep_on_stop=True)
    with connect(home(node), timeout_s=DEADLINE_S) as guest:
        room = guest.open(SPACE)
        room.put(keys_of(2), [content(k) for k in keys_of(2)])
        view = room.view(keys_of(2))
        assert view[0] is not None
        node.stop()
        again = node_at(path)
        assert guest.stats().tiers[0].quarantined_bytes > 0
        assert set(room.put([key(3)], [content(key(3))])) == {Status.OK}
        assert guest.stats().tiers[0].quarantined_bytes > 0, "the view is still open"
        assert bytes(view[0]) == content(key(0))
        view.release()
        until(lambda: guest.stats().tiers[0].quarantined_bytes == 0, "it lets go")
        assert counter(again, "kvfabric_node_frozen_segments") == 0
        assert [copy is not None for copy in room.get(keys_of(2))] == [True, True]
        again.check()
    again.stop()


def _keeper_at(path: Path) -> int:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))
        return process.peer_of(probe)[0]
