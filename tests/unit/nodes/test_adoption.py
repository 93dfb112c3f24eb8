"""A core rebuilt from records holds what it held, and grants nothing that a guest may touch."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.nodes.conftest import Desk, key, namespace

from kvfabric.types import Key, NamespaceId, Status
from kvfabric_nodes.keeper import adoption, operations, process, records
from kvfabric_nodes.keeper.records import Guest, Record, Shape, State
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.extents import Extents

SHAPE = Shape(segments=6, segment_bytes=4096)
SHARD_BYTES = 1024
WALL_S = 1_800_000_000.0
LATER_S = 50.0  # the new core's clock, when it begins
TOKEN = b"t" * 16

digests = st.binary(min_size=32, max_size=32)
texts = st.text(max_size=20)
any_record = st.builds(
    Record,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
    st.integers(0, 2**32 - 1),
    digests.map(NamespaceId),
    digests.map(Key),
    st.none() | digests.map(Key),
    texts,
    texts,
    st.integers(0, 2**40),
    st.integers(0, 4096),
    st.lists(st.integers(0, 2**64 - 1), max_size=5).map(tuple),
    st.none() | st.floats(0, 1e12),
    st.booleans(),
)


def told(record: Record) -> tuple[bytes, bytes]:
    """What a keeper has of it: key and record."""
    names = [field.name for field in dataclasses.fields(Record)]
    operation = operations.put(*(getattr(record, name) for name in names))
    op, size_bytes = process.HEADER.unpack_from(operation)
    body = operation[process.HEADER.size :]
    assert (op, size_bytes) == (process.Op.PUT, len(body))
    return process.unpack_put(body)


@given(any_record)
def test_a_record_says_the_same_after_it_was_kept(record: Record) -> None:
    name, data = told(record)
    assert name == records.slot_key(record.segment, record.offset)
    assert records.decode(name, data) == record


def test_what_ends_a_record_names_its_place() -> None:
    said = process.packed(process.Op.DELETE, records.slot_key(3, 2**40))
    assert operations.delete(3, 2**40) == said


@given(any_record, st.data())
def test_half_a_record_is_none(record: Record, data: st.DataObject) -> None:
    name, whole = told(record)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ValueError, match="record of a shard"):
        records.decode(name, whole[:cut])


@given(st.dictionaries(st.binary(max_size=40), st.binary(max_size=200)))
def test_any_table_can_be_read(table: dict[bytes, bytes]) -> None:
    state = records.read(table)
    assert len(state.shards) + len(state.guests) + state.unreadable <= len(table)


def test_where_a_guest_cannot_be_read_nothing_is_known_to_be_safe() -> None:
    shape_key, shape = records.encode_shape(SHAPE)
    guest = Guest(TOKEN, 1, 2, 3)
    table = {shape_key: shape, records.guest_key(guest): records.encode_guest(guest)}
    assert records.read(table) == State(SHAPE, [], [guest], 0)
    table[records.guest_key(guest)] = b"?"
    assert records.read(table).shape is None


def old_core() -> NodeCore:
    return NodeCore(Extents(SHAPE.segments, SHAPE.segment_bytes))


def kept(core: NodeCore, now_s: float = 0.0) -> list[Record]:
    """What its keeper would have of it, oldest first."""
    return [
        Record(
            shard.extent.segment,
            shard.extent.offset,
            shard.extent.size_bytes,
            shard.extent.generation,
            shard.namespace,
            shard.key,
            shard.parent,
            shard.pool[0],
            shard.owner,
            shard.size_bytes,
            shard.layers,
            shard.checksums,
            None if shard.expires_s is None else shard.expires_s - now_s + WALL_S,
            shard.pinned,
        )
        for shard in sorted(core.shards, key=lambda shard: shard.last_used)
    ]


def guest(segment: int, token: bytes = TOKEN) -> Guest:
    return Guest(token, segment, 1, 1)


def rebuilt(
    shards: list[Record], guests: Iterable[Guest] = (), segments: Iterable[int] = range(1, 7)
) -> adoption.Adopted:
    adopted = adoption.rebuild(shards, guests, list(segments), SHAPE, LATER_S, WALL_S)
    adopted.core.check()
    return adopted


def granted(desk: Desk, numbers: Iterable[int], size_bytes: int = SHARD_BYTES) -> set[int]:
    """Puts keys of its own; the segments that they were granted in."""
    segments: set[int] = set()
    for number in numbers:
        reservation, _ = desk.reserve([key(number)], size_bytes)
        if reservation is None:
            continue
        segments |= {item.extent.segment for item in reservation.items.values()}
        for index in list(reservation.items):
            desk.core.seal(reservation, index, (1,), LATER_S)
    desk.core.check()
    return segments


def test_what_was_held_is_held_again_where_it_lay() -> None:
    desk = Desk(old_core(), principal="a/engine")
    desk.chain([key(n) for n in range(4)])
    desk.put([key(9)], ttl_s=20.0)
    desk.core.pin(desk.session, desk.namespace, [key(2)])
    before = {shard.key: shard for shard in desk.core.shards}

    core = rebuilt(kept(desk.core)).core

    after = {shard.key: shard for shard in core.shards}
    assert after.keys() == before.keys()
    for name, shard in after.items():
        old = before[name]
        assert (shard.extent.segment, shard.extent.offset) == (
            old.extent.segment,
            old.extent.offset,
        )
        assert (shard.parent, shard.owner, shard.pool) == (old.parent, "a/engine", old.pool)
        assert shard.pinned == (name == key(2))
    assert core.pins == 1
    assert core.inventory_hash == desk.core.inventory_hash
    assert {name for _, name in core.added} == before.keys()
    (event,) = core.story.tell(frozenset({desk.namespace}), key(0))
    assert (event.what, event.at_s) == ("adopted", LATER_S)
    core.tick(LATER_S + 19.0)
    assert core.shards.get(desk.namespace, key(9)) is not None
    core.tick(LATER_S + 21.0)
    assert core.shards.get(desk.namespace, key(9)) is None, "its time went on"


def test_its_tenant_may_use_what_was_adopted_and_no_other() -> None:
    desk = Desk(old_core())
    desk.put([key(1)])
    core = rebuilt(kept(desk.core)).core
    again, other = Desk(core), Desk(core, "b")
    assert again.holds([key(1)]) == [True]
    assert core.namespaces_of("a") == {desk.namespace}
    assert other.holds([key(1)]) == [False]


def test_without_guests_everything_can_be_granted_again_and_nothing_looks_like_before() -> None:
    desk = Desk(old_core())
    desk.put([key(n) for n in range(6)])
    old = {shard.extent.generation for shard in desk.core.shards}
    core = rebuilt(kept(desk.core)).core
    books = core.books()
    assert books.held_bytes == 6 * SHARD_BYTES
    assert books.free_bytes == books.capacity_bytes - books.held_bytes
    again = Desk(core)
    reservation = again.granted([key(n) for n in range(100, 118)])
    generations = {item.extent.generation for item in reservation.items.values()}
    assert min(generations) > max(old)
    assert {item.extent.segment for item in reservation.items.values()} & {2}, "its slots are used"
    fresh = core.extents.segments.keys() - {1, 2}
    assert min(fresh) > 6, "an emptied segment's number would name other memory"
    core.check()


def test_the_oldest_is_still_the_first_to_go() -> None:
    desk = Desk(old_core())
    numbers = list(range(24))
    random.Random(1).shuffle(numbers)
    for number in numbers:
        desk.put([key(number)])
    core = rebuilt(kept(desk.core)).core
    again = Desk(core)
    again.put([key(100)])
    assert again.holds([key(numbers[0]), key(numbers[1])]) == [False, True]


def test_nothing_of_a_frozen_segment_is_granted_before_its_guests_have_gone() -> None:
    desk = Desk(old_core())
    desk.put([key(n) for n in range(2)])  # in segment 1, which has two free slots
    adopted = rebuilt(kept(desk.core), [guest(1)])
    core = adopted.core
    assert core.books().quarantined_bytes == 2 * SHARD_BYTES
    again = Desk(core)
    assert again.holds([key(0), key(1)]) == [True, True]
    assert 1 not in granted(again, range(100, 140)), "more than there is room for"
    assert again.holds([key(0), key(1)]) == [True, True], "no room is made where none can be used"

    core.purge(again.session, again.namespace, [key(0)], "", LATER_S)
    core.check()
    assert core.books().quarantined_bytes == 3 * SHARD_BYTES
    assert 1 not in granted(again, range(200, 220))

    core.close_session(adopted.former[1], LATER_S)
    core.check()
    assert core.books().quarantined_bytes == 0
    assert granted(again, range(300, 303)) == {1}


def test_a_frozen_segment_that_holds_nothing_comes_back_as_other_memory() -> None:
    adopted = rebuilt([], [guest(3), guest(4)])
    core = adopted.core
    books = core.books()
    assert books.quarantined_bytes == 2 * SHAPE.segment_bytes
    assert books.free_bytes == 4 * SHAPE.segment_bytes
    assert {3, 4} < set(core.extents.all_ids())
    core.close_session(adopted.former[3], LATER_S)
    core.check()
    ((old, new),) = core.recycled
    assert old == 3
    assert new > 6
    assert core.books().quarantined_bytes == SHAPE.segment_bytes


def test_what_cannot_be_right_is_dropped_with_its_reason() -> None:
    good = record(0)
    state = State(
        SHAPE,
        [
            good,
            record(1, segment=99),
            record(2, offset=100),
            record(3, offset=4096),
            record(4, slot_bytes=2048),
            record(5, tenant="b"),
            record(6, checksums=(1, 2)),
            record(7, layers=0),
            record(8, expires_at_s=WALL_S - 1),
            dataclasses.replace(good, offset=2048),
        ],
        [],
        unreadable=2,
    )
    plan = adoption.plan(state, {1, 2}, SHAPE, WALL_S)
    assert plan.records == [good]
    assert plan.dropped == {
        "unreadable": 2,
        "no memory": 1,
        "misplaced": 5,
        "no checksums": 1,
        "expired": 1,
        "twice": 1,
    }


def test_memory_of_another_shape_is_not_adopted() -> None:
    for shape in (None, Shape(5, 4096), Shape(6, 8192)):
        plan = adoption.plan(State(shape, [record(0)], [], 0), {1}, SHAPE, WALL_S)
        assert plan.records == []
        assert plan.dropped == {"other shape": 1}
    plan = adoption.plan(State(SHAPE, [record(0)], [], 0), range(1, 8), SHAPE, WALL_S)
    assert plan.records == [], "there are more segments than there can be"


def record(number: int, **rest: object) -> Record:
    fields: dict[str, object] = {
        "segment": 1,
        "offset": 1024,
        "slot_bytes": SHARD_BYTES,
        "generation": 1,
        "namespace": namespace("a"),
        "key": key(number),
        "parent": None,
        "tenant": "a",
        "owner": "a",
        "size_bytes": SHARD_BYTES,
        "layers": 1,
        "checksums": (1,),
        "expires_at_s": None,
        "pinned": False,
    }
    return Record(**{**fields, **rest})  # type: ignore[arg-type]


@given(st.randoms(use_true_random=False))
def test_whatever_was_held_and_mapped_the_books_balance_and_guests_are_safe(
    chance: random.Random,
) -> None:
    desks = [Desk(core := old_core()), Desk(core, "b")]
    for number in range(chance.randrange(40)):
        desk = chance.choice(desks)
        desk.put([key(number)], chance.choice([500, 1024, 4096]))
        if chance.random() < 0.2:
            desk.core.purge(desk.session, desk.namespace, [key(chance.randrange(40))], "", 0.0)
    right = [each for each in kept(core) if chance.random() < 0.8]
    segments = set(core.extents.segments)
    guests = [guest(segment) for segment in segments if chance.random() < 0.5]
    adopted = rebuilt(right, guests, segments)
    frozen = {each.segment for each in guests}
    assert adopted.former.keys() == frozen
    assert adopted.core.shards.count == len(right)
    again = Desk(adopted.core, chance.choice("ab"))
    while frozen:
        new = granted(again, [chance.randrange(1000, 2000) for _ in range(8)], 1024)
        assert not new & frozen
        segment = chance.choice(sorted(frozen))
        frozen.remove(segment)
        adopted.core.close_session(adopted.former[segment], LATER_S)
        adopted.core.check()
    books = adopted.core.books()
    assert books.quarantined_bytes == 0
    assert books.capacity_bytes == SHAPE.segments * SHAPE.segment_bytes
    assert again.put([key(5000)]) == [Status.OK]
