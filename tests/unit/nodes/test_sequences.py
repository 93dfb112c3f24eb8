"""Sequences: one writer, what is visible, what is kept, what ends and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvfabric.errors import Conflict, Denied, Refused, Retry
from kvfabric.types import Key, Status
from kvfabric_nodes.sequences.core import SequenceLimits, Sequences
from kvfabric_nodes.sequences.idle import SWEEP_ENTRIES
from kvfabric_nodes.sequences.sequence import Block, Shape
from kvfabric_nodes.store.core import NodeCore

from .conftest import SEGMENT_BYTES, SEGMENTS, SHARD_BYTES, Desk
from .sequencing import IDLE_S, LAYERS, SHAPE, TOKENS, begin, put, seal, write

Keys = Callable[..., list[Key]]
SLOTS = SEGMENTS * SEGMENT_BYTES // SHARD_BYTES


@pytest.fixture
def sequences(core: NodeCore) -> Iterator[Sequences]:
    limits = SequenceLimits(
        sequences=8, sequences_of_session=6, tails=3, forks=2, tentative_blocks=3, blocks=20
    )
    sequences = Sequences(core, limits, first_id=100)
    yield sequences
    sequences.check()
    assert all(
        core.shards.claims(*name) == count for name, count in sequences.sharing.claims().items()
    )


def remote(core: NodeCore, tenant: str = "a") -> Desk:
    """A client that shares no memory."""
    desk = Desk(core, tenant)
    desk.session.shares_memory = False
    return desk


# Begin ----------------------------------------------------------------------------------


def test_a_sequence_begins_with_blocks_and_keeps_them(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    desk.chain(keys(1, 2))

    sequence = begin(sequences, desk, keys(1, 2))
    for number in range(10, 10 + SLOTS):
        desk.put(keys(number))

    assert (sequence.length, sequence.away) == (2 * TOKENS, 0)
    assert desk.holds(keys(1, 2)) == [True, True]


def test_blocks_that_lie_elsewhere_count_as_away_until_they_come(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    desk.chain(keys(1))
    sequence = begin(sequences, desk, keys(1, 2))
    assert sequence.away == 1

    desk.put(keys(2))

    assert sequence.away == 0


def test_another_tenants_namespace_has_no_sequences_for_us(
    sequences: Sequences, desk: Desk, other: Desk
) -> None:
    with pytest.raises(Denied):
        sequences.open(other.session, desk.namespace, SHAPE, [], IDLE_S, 0.0)
    sequence = begin(sequences, desk)
    with pytest.raises(Denied):
        sequences.find(other.session, sequence.id, 0.0)
    with pytest.raises(Denied):
        sequences.resume(other.session, sequence.id, 0.0, 0.0)


@pytest.mark.parametrize(
    ("shape", "blocks", "why"),
    [
        (Shape(SEGMENT_BYTES + 64, 1, TOKENS), [], "do not fit into a segment"),
        (SHAPE, [Block(Key(b"k" * 32), TOKENS + 1)], "a block of 5 tokens"),
        (SHAPE, [Block(Key(b"k" * 32), 0)], "a block of 0 tokens"),
        (SHAPE, [Block(Key(b"k" * 32), 4), Block(Key(b"k" * 32), 4)], "named twice"),
    ],
)
def test_what_no_sequence_can_be_is_refused(
    sequences: Sequences, desk: Desk, shape: Shape, blocks: list[Block], why: str
) -> None:
    with pytest.raises(Refused, match=why):
        sequences.open(desk.session, desk.namespace, shape, blocks, IDLE_S, 0.0)


def test_bytes_are_there_before_they_are_shown_and_a_cut_is_shown_before_they_change(
    sequences: Sequences, desk: Desk
) -> None:
    sequence, shown = begin(sequences, desk, []), list[list[int]]()

    def fence() -> None:
        assert sequence.board is not None
        shown.append(sequence.board.tolist())

    sequence.watched(fence)
    shown.clear()
    write(sequences, sequence, 2)
    assert shown == [[0, 0, 0]]
    sequences.truncate(sequence, 1, 0.0)
    assert shown[1] == [2, 2, 1]
    assert sequence.watched().tolist() == [1, 1, 1]


def test_a_sequence_with_nothing_open_goes_on_with_further_blocks(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    desk.chain(keys(1, 2, 3))
    sequence = begin(sequences, desk, keys(1))
    board = sequence.watched()

    further = [Block(key, TOKENS) for key in keys(2, 3, 4)]
    assert sequences.go_on(desk.session, sequence.id, further, 0.0) is sequence

    assert (sequence.length, sequence.epoch, sequence.away) == (4 * TOKENS, 1, 1)
    assert [block.key for block in sequence.blocks] == keys(1, 2, 3, 4)
    assert board.tolist() == [4 * TOKENS] * LAYERS + [0]
    sequences.extend(sequence, 1, 0.0)
    write(sequences, sequence, 1)


def test_only_the_writer_of_what_has_nothing_open_goes_on_with_further_blocks(
    sequences: Sequences, desk: Desk, core: NodeCore, keys: Keys
) -> None:
    sequence = begin(sequences, desk, keys(1))
    two = [Block(key, TOKENS) for key in keys(2)]

    with pytest.raises(Conflict, match="not the writer"):
        sequences.go_on(Desk(core).session, sequence.id, two, 0.0)
    with pytest.raises(Refused, match="named twice"):
        sequences.go_on(desk.session, sequence.id, [Block(keys(1)[0], TOKENS)], 0.0)
    with pytest.raises(Refused, match="a block of 5 tokens"):
        sequences.go_on(desk.session, sequence.id, [Block(keys(2)[0], 5)], 0.0)
    many = [Block(key, TOKENS) for key in keys(*range(2, 22))]
    with pytest.raises(Refused, match="at most 20 sealed blocks"):
        sequences.go_on(desk.session, sequence.id, many, 0.0)
    core.draining = True
    with pytest.raises(Retry, match="drained"):
        sequences.go_on(desk.session, sequence.id, two, 0.0)
    core.draining = False
    sequences.extend(sequence, 1, 0.0)
    with pytest.raises(Refused, match="open blocks or forks"):
        sequences.go_on(desk.session, sequence.id, two, 0.0)
    assert sequence.length == TOKENS


def test_a_draining_node_opens_none_but_goes_on_with_those_it_has(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    sequence = begin(sequences, desk)
    desk.core.draining = True

    put(sequences, sequence, keys(1))

    assert sequence.length == TOKENS
    with pytest.raises(Retry, match="drained"):
        begin(sequences, desk)


def test_sequences_are_bounded_per_session_and_per_node(
    sequences: Sequences, desk: Desk, core: NodeCore
) -> None:
    for _ in range(6):
        begin(sequences, desk)
    with pytest.raises(Refused, match="this session writes 6"):
        begin(sequences, desk)
    second = Desk(core)
    begin(sequences, second)
    begin(sequences, second)
    with pytest.raises(Retry, match="8 sequences are open"):
        begin(sequences, second)


# Writing --------------------------------------------------------------------------------


def test_tokens_become_visible_in_open_blocks(sequences: Sequences, desk: Desk) -> None:
    sequence = begin(sequences, desk)
    assert sequences.extend(sequence, 2, 0.0) == (0, "")

    sequence.append(0, 3, 0, LAYERS)
    sequence.append(3, 2, 0, LAYERS)

    assert (sequence.length, sequence.sealed, sequence.room) == (5, 0, 8)
    assert desk.core.books().reserved_bytes == 2 * SHARD_BYTES


def test_an_append_may_be_repeated_but_leaves_no_gap(sequences: Sequences, desk: Desk) -> None:
    sequence = begin(sequences, desk)
    sequences.extend(sequence, 2, 0.0)
    sequence.append(0, 3, 0, LAYERS)

    sequence.append(0, 3, 0, LAYERS)
    sequence.append(2, 2, 0, LAYERS)

    assert sequence.length == 4
    assert sequence.repeats(0, 3, 0, LAYERS)
    assert sequence.repeats(3, 0, 0, LAYERS)  # late bytes of what is visible by now
    assert not sequence.repeats(4, 0, 0, LAYERS)
    assert not sequence.repeats(3, 2, 0, LAYERS)
    with pytest.raises(Conflict, match="4 are visible"):
        sequence.append(5, 1, 0, LAYERS)
    with pytest.raises(Refused, match="extend first"):
        sequence.append(4, 5, 0, LAYERS)


def test_a_token_is_visible_once_every_layer_has_it(sequences: Sequences, desk: Desk) -> None:
    sequence = begin(sequences, desk)
    sequences.extend(sequence, 1, 0.0)

    sequence.append(0, 3, 0, 1)
    assert (sequence.length, sequence.visible(0), sequence.visible(1)) == (0, 3, 0)
    with pytest.raises(Conflict):
        sequence.append(3, 1, 1, 1)
    sequence.append(0, 2, 1, 1)

    assert (sequence.length, sequence.visible(0), sequence.visible(1)) == (2, 3, 2)
    sequence.append(2, 1, 1, 1)
    assert (sequence.length, sequence.ahead) == (3, {})
    with pytest.raises(Refused, match="layers 1 to 2"):
        sequence.append(3, 1, 1, 2)


def test_open_blocks_are_bounded_and_only_those_there_is_room_for_are_granted(
    sequences: Sequences, desk: Desk, core: NodeCore, keys: Keys
) -> None:
    desk.granted(keys(*range(SLOTS - 2)))
    sequence = begin(sequences, desk)

    assert sequences.extend(sequence, 9, 0.0)[0] == 1
    assert len(sequence.tails) == 2
    desk.core.abort(next(iter(desk.session.reservations.values())))
    lacking, reason = sequences.extend(sequence, 9, 0.0)

    assert (lacking, len(sequence.tails)) == (0, 3)
    assert "at most 3 open blocks" in reason


def test_cache_is_evicted_for_open_blocks(sequences: Sequences, desk: Desk, keys: Keys) -> None:
    desk.chain(keys(*range(SLOTS)))
    sequence = begin(sequences, desk, keys(0, 1))

    assert sequences.extend(sequence, 3, 0.0) == (0, "")

    assert desk.holds(keys(0, 1, 2)) == [True, True, True]  # the chain is eaten from its end
    assert desk.holds(keys(SLOTS - 1, SLOTS - 2, SLOTS - 3)) == [False] * 3


# Sealing --------------------------------------------------------------------------------


def test_a_full_open_block_becomes_a_shard_that_continues_the_one_before(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    sequence = begin(sequences, desk)
    put(sequences, sequence, keys(1, 2))

    first, second = (desk.core.shards.get(desk.namespace, key) for key in keys(1, 2))

    assert first is not None
    assert second is not None
    assert (first.parent, second.parent) == (None, first.key)
    assert (sequence.length, sequence.sealed, sequence.tails) == (8, 8, [])
    assert desk.core.books().reserved_bytes == 0


def test_what_somebody_sealed_meanwhile_is_shared_and_the_open_block_freed(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    sequence = begin(sequences, desk)
    write(sequences, sequence, TOKENS)
    desk.put(keys(1))

    assert seal(sequences, sequence, keys(1)) == [Status.EXISTS]

    books = desk.core.books()
    assert (books.held_bytes, books.reserved_bytes) == (SHARD_BYTES, 0)
    assert desk.core.shards.claims(desk.namespace, keys(1)[0]) == 1


def test_who_was_writing_what_a_sequence_sealed_learns_that_it_exists(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    slow = desk.granted(keys(1))
    sequence = begin(sequences, desk)
    put(sequences, sequence, keys(1))

    grant = desk.core.seal(slow, 0, (1,), 0.0)

    assert grant.status is Status.EXISTS
    assert desk.core.books().reserved_bytes == 0


def test_only_the_last_block_may_be_short_and_new_ones_follow_it(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    sequence = begin(sequences, desk)
    write(sequences, sequence, TOKENS + 1)
    sequences.extend(sequence, 3, 0.0)

    with pytest.raises(Refused, match="only the last"):
        sequences.sealable(sequence, keys(1, 2), [1, TOKENS])
    assert seal(sequences, sequence, keys(1, 2), last=1) == [Status.OK, Status.OK]

    assert (sequence.sealed, sequence.length, sequence.room) == (5, 5, 9)
    put(sequences, sequence, keys(3))
    assert sequence.ends == [4, 5, 9]


@pytest.mark.parametrize(
    ("numbers", "tokens", "why"),
    [
        ([], [], "0 keys"),
        ([1, 2, 3], [], "of 2 open blocks"),
        ([1], [4, 4], "one per block"),
        ([1, 2], [], "6 are visible in every layer"),
        ([1], [3], "must end where the sequence does"),
        ([1, 1], [4, 2], "the same key"),
        ([9], [], "already"),
        ([1], [5], "may be short"),
    ],
)
def test_what_cannot_be_sealed_is_refused(
    sequences: Sequences, desk: Desk, keys: Keys, numbers: list[int], tokens: list[int], why: str
) -> None:
    sequence = begin(sequences, desk)
    put(sequences, sequence, keys(9))
    write(sequences, sequence, TOKENS)
    write(sequences, sequence, 2)
    if numbers == [1, 2] and not tokens:
        why = "10 are visible"  # absolute, with the sealed block

    with pytest.raises(Refused, match=why):
        sequences.sealable(sequence, keys(*numbers), tokens)


def test_shards_of_another_size_are_no_blocks(sequences: Sequences, desk: Desk, keys: Keys) -> None:
    desk.put(keys(1), size_bytes=SHARD_BYTES // 2)
    sequence = begin(sequences, desk)
    write(sequences, sequence, TOKENS)

    with pytest.raises(Refused, match="has 512 bytes"):
        sequences.sealable(sequence, keys(1), [])
    with pytest.raises(Refused, match="has 512 bytes"):
        begin(sequences, desk, keys(1))


def test_a_short_block_waits_for_layers_that_lag(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    sequence = begin(sequences, desk)
    write(sequences, sequence, 1)
    sequence.append(1, 2, 0, 1)

    with pytest.raises(Refused, match="in every layer"):
        sequences.sealable(sequence, keys(1), [1])


# Writers --------------------------------------------------------------------------------


def test_a_new_epoch_fences_the_old_writer(
    sequences: Sequences, desk: Desk, core: NodeCore, keys: Keys
) -> None:
    heir = Desk(core)
    sequence = begin(sequences, desk)
    put(sequences, sequence, keys(1))
    write(sequences, sequence, 2)

    assert sequences.resume(heir.session, sequence.id, 0.0, 0.0) is sequence

    assert (sequence.epoch, sequence.length, sequence.tails) == (2, TOKENS, [])
    for session, epoch in ((desk.session, 1), (desk.session, 2), (heir.session, 1)):
        with pytest.raises(Conflict, match="resume it"):
            sequences.writer(session, sequence.id, epoch, 0.0)
    assert sequences.writer(heir.session, sequence.id, 2, 0.0) is sequence


def test_what_the_old_writer_had_open_is_quarantined_until_it_lets_go(
    sequences: Sequences, desk: Desk, core: NodeCore
) -> None:
    sequence = begin(sequences, desk)
    write(sequences, sequence, 2)

    sequences.resume(Desk(core).session, sequence.id, 0.0, 0.0)

    books = core.books()
    assert (books.reserved_bytes, books.quarantined_bytes) == (0, SHARD_BYTES)
    sequences.let_go(desk.session, sequence.id)
    assert core.books().quarantined_bytes == 0


def test_what_a_writer_without_shared_memory_had_open_is_free_at_once(
    sequences: Sequences, core: NodeCore
) -> None:
    desk = remote(core)
    sequence = begin(sequences, desk)
    write(sequences, sequence, 2)

    sequences.resume(Desk(core).session, sequence.id, 0.0, 0.0)

    books = core.books()
    assert (books.reserved_bytes, books.quarantined_bytes) == (0, 0)


def test_a_writer_that_dies_leaves_the_sealed_part(
    sequences: Sequences, desk: Desk, core: NodeCore, keys: Keys
) -> None:
    heir = Desk(core)
    sequence = begin(sequences, desk)
    put(sequences, sequence, keys(1))
    write(sequences, sequence, 2)
    fork = sequences.fork(desk.session, sequence, 1, IDLE_S, 0.0, tentative=True)

    core.close_session(desk.session, 0.0)

    assert (sequence.session, sequence.length, fork.open) == (None, TOKENS, False)
    assert core.books().reserved_bytes == 0
    sequences.resume(heir.session, sequence.id, 0.0, 0.0)
    put(sequences, sequence, keys(2))
    assert sequence.length == 2 * TOKENS


# The end --------------------------------------------------------------------------------


def test_a_closed_sequence_leaves_cache_or_with_drop_nothing(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    kept, dropped = begin(sequences, desk), begin(sequences, desk)
    put(sequences, kept, keys(1))
    put(sequences, dropped, keys(2))
    write(sequences, dropped, 1)

    sequences.end(kept, 0.0, let_go=True)
    sequences.end(dropped, 0.0, let_go=True, drop=True)

    assert desk.holds(keys(1, 2)) == [True, False]
    assert desk.core.books().reserved_bytes == 0
    with pytest.raises(Refused, match="no sequence"):
        sequences.find(desk.session, kept.id, 0.0)


def test_a_drop_spares_what_others_keep(sequences: Sequences, desk: Desk, keys: Keys) -> None:
    first = begin(sequences, desk)
    put(sequences, first, keys(1, 2, 3))
    second = begin(sequences, desk, keys(1))
    desk.core.pin(desk.session, desk.namespace, keys(2))

    sequences.end(first, 0.0, let_go=True, drop=True)

    assert desk.holds(keys(1, 2, 3)) == [True, True, False]
    assert second.away == 0


def test_an_idle_sequence_ends_by_itself_and_a_busy_one_does_not(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    idle, busy, waiting = (begin(sequences, desk) for _ in range(3))
    put(sequences, idle, keys(1))
    write(sequences, idle, 1)
    waiting.calls = 1

    for _ in range(3):
        desk.wait(IDLE_S - 1)
        sequences.tick(desk.now_s)
        sequences.find(desk.session, busy.id, desk.now_s)

    assert (idle.open, busy.open, waiting.open) == (False, True, True)
    assert desk.holds(keys(1)) == [True]  # as cache
    assert desk.core.books().quarantined_bytes == SHARD_BYTES  # its client may still write there
    waiting.calls = 0
    desk.wait(2 * IDLE_S)
    sequences.tick(desk.now_s)
    assert not waiting.open


def test_sequences_that_come_and_go_leave_nothing_behind(sequences: Sequences, desk: Desk) -> None:
    for _ in range(2 * SWEEP_ENTRIES):
        sequences.end(begin(sequences, desk), 0.0, let_go=True)

    assert len(sequences._idle._heap) <= SWEEP_ENTRIES + 1


def test_a_shorter_idle_time_of_a_new_writer_holds(
    sequences: Sequences, desk: Desk, core: NodeCore
) -> None:
    sequence = begin(sequences, desk)
    sequences.resume(Desk(core).session, sequence.id, 1.0, 0.0)

    sequences.tick(2.0)

    assert not sequence.open


def test_purged_blocks_are_away_and_the_length_stays(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    sequence = begin(sequences, desk)
    put(sequences, sequence, keys(1, 2))

    desk.core.purge(desk.session, desk.namespace, keys(2), "", 0.0)

    assert (sequence.away, sequence.length) == (1, 2 * TOKENS)
    sequences.truncate(sequence, TOKENS, 0.0)
    assert sequence.away == 0


# Forks ----------------------------------------------------------------------------------


def test_forks_share_one_stored_copy(sequences: Sequences, desk: Desk, keys: Keys) -> None:
    parent = begin(sequences, desk)
    put(sequences, parent, keys(1, 2))

    forks = [
        sequences.fork(desk.session, parent, 2, IDLE_S, 0.0, tentative=False) for _ in range(4)
    ]

    assert desk.core.books().held_bytes == 2 * SHARD_BYTES
    assert {fork.length for fork in forks} == {2 * TOKENS}
    assert desk.core.shards.claims(desk.namespace, keys(1)[0]) == 5
    sequences.end(parent, 0.0, let_go=True, drop=True)
    assert desk.holds(keys(1, 2)) == [True, True]
    for fork in forks:
        sequences.end(fork, 0.0, let_go=True, drop=True)
    assert desk.core.books().held_bytes == 0


def test_tentative_forks_are_bounded_in_number_and_blocks(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    parent = begin(sequences, desk)
    put(sequences, parent, keys(1))
    first, second = (
        sequences.fork(desk.session, parent, 1, IDLE_S, 0.0, tentative=True) for _ in range(2)
    )

    with pytest.raises(Refused, match="2 tentative forks"):
        sequences.fork(desk.session, parent, 1, IDLE_S, 0.0, tentative=True)
    assert sequences.extend(first, 2, 0.0) == (0, "")
    lacking, reason = sequences.extend(second, 2, 0.0)

    assert (lacking, len(second.tails)) == (0, 1)
    assert "at most 3 open blocks" in reason
    with pytest.raises(Refused, match="have its parent accept it"):
        sequences.sealable(first, keys(2), [])


def test_accept_takes_one_attempt_over_and_frees_the_rest_at_once(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    parent = begin(sequences, desk)
    put(sequences, parent, keys(1))
    write(sequences, parent, 1)
    good, bad = (
        sequences.fork(desk.session, parent, 1, IDLE_S, 0.0, tentative=True) for _ in range(2)
    )
    write(sequences, good, 6)
    write(sequences, bad, 2)
    extents = [tail.extent for tail in good.tails]

    sequences.accept(parent, good.id, 2 * TOKENS, 0.0)

    assert parent.length == 2 * TOKENS
    assert [tail.extent for tail in parent.tails] == extents[:1]
    assert (good.open, bad.open, parent.forks) == (False, False, {})
    assert desk.core.books().reserved_bytes == SHARD_BYTES
    assert seal(sequences, parent, keys(2)) == [Status.OK]


def test_accepting_none_ends_all_attempts(sequences: Sequences, desk: Desk) -> None:
    parent = begin(sequences, desk)
    write(sequences, parent, 3)
    fork = sequences.fork(desk.session, parent, 0, IDLE_S, 0.0, tentative=True)
    write(sequences, fork, 1)

    sequences.accept(parent, 0, 2, 0.0)

    assert (parent.length, fork.open) == (2, False)
    assert desk.core.books().reserved_bytes == SHARD_BYTES


def test_a_fork_of_a_fork_belongs_to_the_same_parent(
    sequences: Sequences, desk: Desk, core: NodeCore
) -> None:
    parent = begin(sequences, desk)
    fork = sequences.fork(desk.session, parent, 0, IDLE_S, 0.0, tentative=True)

    deeper = sequences.fork(desk.session, fork, 0, IDLE_S, 0.0, tentative=True)

    assert deeper.root is parent
    with pytest.raises(Refused, match="is tentative"):
        sequences.fork(desk.session, fork, 0, IDLE_S, 0.0, tentative=False)
    with pytest.raises(Conflict, match="only the writer"):
        sequences.fork(Desk(core).session, parent, 0, IDLE_S, 0.0, tentative=True)
    with pytest.raises(Refused, match="no tentative fork 7"):
        sequences.accept(parent, 7, 0, 0.0)


def test_an_attempt_keeps_what_its_parent_lets_go(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    parent = begin(sequences, desk)
    put(sequences, parent, keys(1, 2))
    first = sequences.fork(desk.session, parent, 2, IDLE_S, 0.0, tentative=True)
    second = sequences.fork(desk.session, first, 1, IDLE_S, 0.0, tentative=True)
    assert [desk.core.shards.claims(desk.namespace, key) for key in keys(1, 2)] == [1, 1]

    sequences.truncate(parent, TOKENS, 0.0)

    assert (first.through_root, second.through_root) == (0, 1)
    assert [desk.core.shards.claims(desk.namespace, key) for key in keys(1, 2)] == [2, 1]
    sequences.accept(parent, first.id, 2 * TOKENS, 0.0)
    assert parent.length == 2 * TOKENS
    assert [desk.core.shards.claims(desk.namespace, key) for key in keys(1, 2)] == [1, 1]


def test_attempts_end_with_their_parent(sequences: Sequences, desk: Desk, core: NodeCore) -> None:
    closed, fenced = begin(sequences, desk), begin(sequences, desk)
    forks = [
        sequences.fork(desk.session, parent, 0, IDLE_S, 0.0, tentative=True)
        for parent in (closed, fenced)
    ]
    for fork in forks:
        write(sequences, fork, 1)

    sequences.end(closed, 0.0, let_go=True)
    sequences.resume(Desk(core).session, fenced.id, 0.0, 0.0)

    assert [fork.open for fork in forks] == [False, False]
    assert core.books().quarantined_bytes == SHARD_BYTES  # of the one that did not let go


# Truncation -----------------------------------------------------------------------------


def test_a_truncation_frees_open_blocks_behind_it(sequences: Sequences, desk: Desk) -> None:
    sequence = begin(sequences, desk)
    write(sequences, sequence, 2 * TOKENS + 1)
    sequence.append(sequence.length, 1, 0, 1)

    sequences.truncate(sequence, TOKENS + 1, 0.0)

    assert (sequence.length, len(sequence.tails), sequence.ahead) == (TOKENS + 1, 2, {})
    sequences.truncate(sequence, TOKENS, 0.0)
    assert (sequence.length, len(sequence.tails)) == (TOKENS, 1)
    with pytest.raises(Refused, match="5 tokens of a sequence that has 4"):
        sequences.truncate(sequence, TOKENS + 1, 0.0)


def test_a_truncation_between_blocks_lets_the_others_go(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    sequence = begin(sequences, desk)
    put(sequences, sequence, keys(1, 2, 3))

    sequences.truncate(sequence, TOKENS, 0.0)

    assert [block.key for block in sequence.blocks] == keys(1)
    assert [desk.core.shards.claims(desk.namespace, key) for key in keys(1, 2, 3)] == [1, 0, 0]


def test_where_a_position_falls(sequences: Sequences, desk: Desk, keys: Keys) -> None:
    sequence = begin(sequences, desk)
    put(sequences, sequence, keys(1, 2))
    write(sequences, sequence, 3)

    inside, between, behind = (sequence.cut(n) for n in (TOKENS + 1, TOKENS, 2 * TOKENS + 2))

    assert (inside.blocks, inside.start, inside.rest) == (1, TOKENS, 1)
    assert inside.block == sequence.blocks[1]
    assert (between.blocks, between.rest, between.block) == (1, 0, None)
    assert (behind.blocks, behind.rest, behind.block) == (2, 2, None)


# Lending --------------------------------------------------------------------------------


def test_what_may_be_lent_is_the_longest_sequences_oldest_blocks(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    short, long = begin(sequences, desk), begin(sequences, desk)
    put(sequences, short, keys(1, 2))
    put(sequences, long, keys(11, 12, 13))
    pool = ("a", SHARD_BYTES)

    def lent(size_bytes: int, sequence_id: int = 0) -> list[Key]:
        return [shard.key for shard in sequences.victims(pool, size_bytes, sequence_id=sequence_id)]

    assert lent(2 * SHARD_BYTES) == keys(11, 12)
    assert lent(100 * SHARD_BYTES) == keys(11, 12, 13, 1, 2)
    assert lent(SHARD_BYTES, sequence_id=short.id) == keys(1)
    assert lent(SHARD_BYTES, sequence_id=7) == []


def test_what_was_lent_is_not_looked_through_again_before_some_of_it_is_back(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    """A sequence may have a hundred times more blocks on loan than here."""
    sequence = begin(sequences, desk)
    put(sequences, sequence, keys(1, 2, 3, 4, 5))

    def lent() -> list[Key]:
        found = [shard.key for shard in sequences.victims(None, 100 * SHARD_BYTES)]
        sequences.check()
        return found

    for number in (1, 2, 4):
        shard = desk.core.shards.get(desk.namespace, *keys(number))
        assert shard is not None
        desk.core.drop(shard, "lent", "to n1", 0.0)
    assert lent() == keys(3, 5)
    assert sequence.lent_first == 2
    desk.put(keys(2))
    assert lent() == keys(2, 3, 5)
    sequences.truncate(sequence, TOKENS, 0.0)
    assert lent() == []
    write(sequences, sequence, TOKENS)
    seal(sequences, sequence, keys(6))
    assert lent() == keys(6)
    fork = sequences.fork(desk.session, sequence, 2, IDLE_S, 0.0, tentative=True)
    assert [s.key for s in sequences.victims(None, 1 << 30, sequence_id=fork.id)] == keys(6)
    desk.put(keys(1))
    assert lent() == keys(1, 6)


def test_what_is_needed_here_is_not_lent(sequences: Sequences, desk: Desk, keys: Keys) -> None:
    sequence = begin(sequences, desk)
    put(sequences, sequence, keys(1, 2, 3, 4, 5))
    fork = sequences.fork(desk.session, sequence, 5, IDLE_S, 0.0, tentative=False)
    desk.lease(keys(1))
    desk.core.pin(desk.session, desk.namespace, keys(2))
    desk.core.shards.claim(desk.namespace, keys(3)[0])  # a group's or a state's

    found = sequences.victims(None, 1 << 30, lambda shard: shard.key == keys(4)[0])

    assert [shard.key for shard in found] == keys(5)
    desk.core.end_of_claim(desk.namespace, keys(3)[0], 0.0)
    assert fork.open


def test_other_sub_pools_are_lent_after_the_own(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    large = sequences.open(
        desk.session, desk.namespace, Shape(2 * SHARD_BYTES, 1, 16), [], IDLE_S, 0.0
    )
    sequences.extend(large, 1, 0.0)
    large.append(0, 16, 0, 1)
    sequences.seal(large, keys(1)[0], 16, (1,), 0.0)
    small = begin(sequences, desk)
    put(sequences, small, keys(2))

    pool = ("a", SHARD_BYTES)

    assert [s.key for s in sequences.victims(pool, 4 * SHARD_BYTES)] == keys(2, 1)
    assert [s.key for s in sequences.victims(pool, SHARD_BYTES)] == keys(2)


def test_a_heartbeat_tells_of_the_longest_sequences(
    sequences: Sequences, desk: Desk, keys: Keys
) -> None:
    short, long = begin(sequences, desk), begin(sequences, desk)
    put(sequences, short, keys(1))
    put(sequences, long, keys(2, 3))
    desk.core.purge(desk.session, desk.namespace, keys(3), "", 0.0)

    told = sequences.columns()

    assert list(told.sequence) == [long.id, short.id]
    assert list(told.tokens) == [2 * TOKENS, TOKENS]
    assert list(told.local_bytes) == [SHARD_BYTES, SHARD_BYTES]
    assert list(told.remote_bytes) == [SHARD_BYTES, 0]
    assert list(told.block_bytes) == [SHARD_BYTES, SHARD_BYTES]
