"""Sequences on a real node, by shared memory and over TCP: what is appended is what is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvfabric.errors import Conflict, Refused, Retry
from kvfabric.keys import chain, shard_key
from kvfabric.types import BATCH_KEYS, Format, Part, Status
from kvfabric_client import Client, Room
from kvfabric_client.blocks import shape_of
from kvfabric_client.outline import Outline
from kvfabric_client.sequence_opening import Opening
from kvfabric_client.sequence_reads import Missing
from kvfabric_client.tails import APPEND_BYTES
from kvfabric_nodes.node import Node

from .conftest import core_of, flip, payload

FORM = Format("float32", block_tokens=16, layers=3, kv_heads=2, head_dim=8)
BLOCK_BYTES = 3 * 2 * 2 * 16 * 8 * 4

Floats = NDArray[np.float32]


def ids(count: int, seed: int = 0) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(0, 50_000, count)]


def kv(tokens: int, seed: int = 0, form: Format = FORM) -> Floats:
    shape = (form.layers, 2, form.kv_heads, tokens, form.head_dim)
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def test_appended_tokens_are_read_back_and_full_blocks_are_shards(room: Room) -> None:
    prompt, floats = ids(40), kv(40)
    with room.sequence(FORM) as sequence:
        assert sequence.append(prompt[:5], floats[..., :5, :]) == 5
        assert sequence.append(prompt[5:38], floats[..., 5:38, :]) == 38
        assert sequence.append(prompt[38:], floats[..., 38:, :]) == sequence.length == 40
        assert sequence.sealed == 32
        assert np.array_equal(sequence.read(), floats)
        assert np.array_equal(sequence.read(3, 35), floats[..., 3:35, :])
        assert np.array_equal(sequence.read(33, 36), floats[..., 33:36, :])
        part = sequence.read(10, 20, layers=range(1, 3))
        assert np.array_equal(part, floats[1:, :, :, 10:20])
        assert sequence.read(7, 7).shape == (3, 2, 2, 0, 8)

        links = list(chain([prompt[:16], prompt[16:32]]))
        keys = [
            shard_key(room.id, link, Part(16 * i, 16, layers=3, heads=2))
            for i, link in enumerate(links)
        ]
        assert [place.key for place in sequence.blocks()] == [*keys, None]
        assert [place.tokens for place in sequence.blocks()] == [
            range(16),
            range(16, 32),
            range(32, 40),
        ]
        assert {place.node for place in sequence.blocks()} == {"n0"}
        assert room.match(keys).matched == 2
        shard = room.get(keys)[1]
        assert shard is not None
        plain = shard.view(np.float32).reshape(3, 2, 2, 16, 8)
        assert np.array_equal(plain, floats[..., 16:32, :])
    assert room.match(keys).matched == 2  # what was sealed stays as cache


def test_layers_may_be_appended_one_by_one(room: Room) -> None:
    prompt, floats = ids(36), kv(36)
    with room.sequence(FORM) as sequence:
        for layer in range(3):
            assert sequence.length == 0
            assert sequence.append(prompt, floats[layer], layer=layer) == (36 if layer == 2 else 0)
        assert sequence.sealed == 32
        assert np.array_equal(sequence.read(), floats)
        sequence.append([7], (floats[0, 0, :, :1], floats[0, 1, :, :1]), layer=0)
        assert sequence.length == 36
        with pytest.raises(Refused, match="layers reach from token 36 to 37"):
            sequence.append([7], kv(1))
        with pytest.raises(Refused, match="other token ids"):
            sequence.append([8], floats[1, ..., :1, :], layer=1)
        for layer in (1, 2):
            sequence.append([7], floats[0, ..., :1, :], layer=layer)
        assert sequence.length == 37


def test_any_array_may_be_appended(room: Room) -> None:
    torch: Any = pytest.importorskip("torch")
    form = Format("bfloat16", block_tokens=4, layers=2, kv_heads=2, head_dim=8)
    tokens_first = torch.rand(2, 2, 9, 2, 8, dtype=torch.float32).to(torch.bfloat16)
    with room.sequence(form) as sequence:
        sequence.append(range(5), tokens_first[:, :, :5].transpose(2, 3))  # strided
        pairs = [
            (layer[0, 5:].transpose(0, 1), layer[1, 5:].transpose(0, 1)) for layer in tokens_first
        ]
        sequence.append(np.arange(5, 9), pairs)
        read = torch.from_numpy(sequence.read()).view(torch.bfloat16)
        assert torch.equal(read, tokens_first.transpose(2, 3))
        target = torch.zeros(2, 2, 9, 2, 8, dtype=torch.bfloat16)
        assert sequence.read_into(target.transpose(2, 3)) == []
        assert torch.equal(target, tokens_first)


def test_what_does_not_fit_is_refused_and_says_why(room: Room) -> None:
    with room.sequence(FORM) as sequence:
        with pytest.raises(Refused, match=r"KV of shape \[3, 2, 2, 4, 8\] where \[3, 2, 2, 5, 8\]"):
            sequence.append(ids(5), kv(4))
        with pytest.raises(Refused, match="KV of float64 in blocks of float32"):
            sequence.append(ids(4), kv(4).astype(np.float64))
        with pytest.raises(Refused, match="KV of int32 in blocks"):
            room.sequence(Format("float16", 4, "plain", 1, 1, 8)).append(
                [1], np.zeros((1, 2, 1, 1, 8), np.int32)
            )
        with pytest.raises(Refused, match="layer 3 of 3"):
            sequence.append([1], kv(1)[0], layer=3)
        with pytest.raises(Refused, match="token ids"):
            sequence.append([-1], kv(1))
        with pytest.raises(Refused, match="tokens 0 to 9 of a sequence that has 0"):
            sequence.read(0, 9)
        with pytest.raises(Refused, match="give a run such as"):
            sequence.read(layers=range(0, 3, 2))
    with pytest.raises(Refused, match="closed"):
        sequence.append([1], kv(1))
    with pytest.raises(Refused, match="size_bytes"):
        room.sequence(block_tokens=16)


def test_a_sequence_begins_with_what_the_fabric_holds_of_a_prompt(room: Room) -> None:
    prompt, floats = ids(60), kv(60)
    with room.sequence(FORM) as first:
        first.append(prompt[:50], floats[..., :50, :])
    with room.sequence(FORM, tokens=prompt) as second:
        assert second.length == second.sealed == 48
        second.append(prompt[48:], floats[..., 48:, :])
        assert np.array_equal(second.read(), floats)
    with room.sequence(FORM, tokens=[1, *prompt]) as other:
        assert other.length == 0


def test_an_append_with_its_start_may_be_repeated(room: Room) -> None:
    prompt, floats = ids(40), kv(40)
    with room.sequence(FORM) as sequence:
        sequence.append(prompt[:20], floats[..., :20, :])
        for _ in range(2):
            assert sequence.append(prompt[10:40], floats[..., 10:40, :], start=10) == 40
        assert np.array_equal(sequence.read(), floats)
        with pytest.raises(Conflict, match="tokens from 41 on"):
            sequence.append([1], kv(1), start=41)
        with pytest.raises(Refused, match="other token ids"):
            sequence.append([1, 2], kv(2), start=39)


def test_truncated_and_forked_within_a_block(room: Room, node: Node) -> None:
    prompt, floats, other = ids(40), kv(40), kv(40, seed=1)
    with room.sequence(FORM) as sequence:
        sequence.append(prompt, floats)
        with sequence.fork(20) as fork:
            fork.append(ids(20, 1), other[..., 20:, :])
            expected = np.concatenate([floats[..., :20, :], other[..., 20:, :]], axis=3)
            assert np.array_equal(fork.read(), expected)
            assert np.array_equal(sequence.read(), floats)
        assert sequence.truncate(36) == 36
        assert sequence.truncate(19) == 19
        assert sequence.sealed == 16
        assert np.array_equal(sequence.read(), floats[..., :19, :])
        sequence.append(ids(21, 2), other[..., 19:, :])
        expected = np.concatenate([floats[..., :19, :], other[..., 19:, :]], axis=3)
        assert np.array_equal(sequence.read(), expected)
        assert sequence.truncate(0) == 0
        with pytest.raises(Refused, match="1 tokens of a sequence that has 0"):
            sequence.fork(1)
    core_of(node).check()


def test_of_tentative_forks_one_is_accepted_and_the_others_end(room: Room) -> None:
    prompt, floats, tries = ids(70), kv(70), [kv(40, seed=seed) for seed in range(3)]
    with room.sequence(FORM) as sequence:
        sequence.append(prompt[:30], floats[..., :30, :])
        forks = [sequence.fork(tentative=True) for _ in tries]
        for number, (fork, floats_of) in enumerate(zip(forks, tries, strict=True)):
            fork.append(ids(40, number), floats_of)
            assert fork.length == 70
            assert fork.sealed == 16  # before it is accepted nothing of it is shared
        assert sequence.length == 30
        assert sequence.accept(forks[1], 65) == 65
        assert sequence.sealed == 64
        expected = np.concatenate([floats[..., :30, :], tries[1][..., :35, :]], axis=3)
        assert np.array_equal(sequence.read(), expected)
        assert all(fork.closed for fork in forks)
        with pytest.raises(Refused, match="only a tentative fork"):
            sequence.accept(forks[0])
        sequence.append([5], kv(1))
        assert sequence.accept(None) == 66  # nothing is under way: nothing changes


def test_a_tail_is_sealed_short_on_demand(room: Room) -> None:
    prompt, floats = ids(40), kv(40)
    with room.sequence(FORM) as sequence:
        sequence.append(prompt[:24], floats[..., :24, :])
        sequence.truncate(20)  # the block's rest has been used once
        assert sequence.seal() == 20
        assert sequence.seal() == 20
        sequence.append(prompt[20:], floats[..., 20:, :])
        assert [place.tokens for place in sequence.blocks()] == [
            range(16),
            range(16, 20),
            range(20, 36),
            range(36, 40),
        ]
        assert np.array_equal(sequence.read(), floats)
        (short,) = sequence.read_blocks(16, 20)
        assert short is not None
        inside = short.view(np.float32).reshape(3, 2, 2, 16, 8)
        assert not inside[..., 4:, :].any()


def test_blocks_of_a_packing_of_ones_own_are_moved_whole(room: Room) -> None:
    blocks = [payload(number, 3 * 1000) for number in range(5)]
    with room.sequence(size_bytes=3000, layers=3, block_tokens=8) as sequence:
        assert sequence.append(range(16), blocks[:2]) == sequence.sealed == 16
        assert sequence.append(range(16, 40), [[b[:1000], b[1000:]] for b in blocks[2:]]) == 40
        for read, block in zip(sequence.read_blocks(), blocks, strict=True):
            assert read is not None
            assert np.array_equal(read, block)
        with sequence.view(8, 24) as view:
            assert [found.tokens for found in view] == [range(8, 16), range(16, 24)]
            assert [None if found.data is None else bytes(found.data) for found in view] == [
                bytes(b) for b in blocks[1:3]
            ]
        with pytest.raises(Refused, match="whole blocks"):
            sequence.append(range(7), blocks[:1])
        with pytest.raises(Refused, match="read_blocks or view"):
            sequence.read()


def test_a_view_copies_nothing_where_memory_is_shared(room: Room, home: str) -> None:
    prompt, floats = ids(40), kv(40)
    with room.sequence(FORM) as sequence:
        sequence.append(prompt, floats)
        with sequence.view(10, 30) as view:
            parts = []
            for block in view:
                assert block.kv is not None
                assert not block.kv.flags.writeable or home.startswith("tcp")
                parts.append(block.kv)
            assert np.array_equal(np.concatenate(parts, axis=3), floats[..., 10:30, :])
            assert [block.tokens for block in view] == [range(10, 16), range(16, 30)]
            assert view.alive()


def test_large_appends_and_reads_go_in_pieces(room: Room) -> None:
    form = Format("float32", block_tokens=32, layers=4, kv_heads=4, head_dim=64)  # 256 KiB a block
    floats = kv(500, form=form)
    assert floats.nbytes > 4 * APPEND_BYTES
    with room.sequence(form) as sequence:
        assert sequence.append(range(500), floats) == 500
        chunks = list(sequence.chunks(3, max_bytes=1 << 20))
        assert [tokens for tokens, _ in chunks] == [
            range(3, 128),
            range(128, 256),
            range(256, 384),
            range(384, 500),
        ]
        read = np.concatenate([part for _, part in chunks], axis=3)
        assert np.array_equal(read, floats[..., 3:, :])


def test_a_block_that_is_damaged_is_reported_as_missing_and_restored(
    room: Room, vandal: Room
) -> None:
    prompt, floats = ids(64), kv(64)
    with room.sequence(FORM) as sequence:
        sequence.append(prompt, floats)
        key = sequence.blocks()[2].key
        assert key is not None
        flip(vandal, key, BLOCK_BYTES - 1)  # in the last layer
        if sequence.writer.home.link.shares_memory:  # else whole blocks travel
            assert np.array_equal(sequence.read(layers=range(2)), floats[:2])
        target = np.empty_like(floats)
        assert sequence.read_into(target) == [range(32, 48)]
        assert np.array_equal(target[..., :32, :], floats[..., :32, :])
        assert np.array_equal(target[..., 48:, :], floats[..., 48:, :])
        with pytest.raises(Missing, match="tokens 40 to 47 is lost") as caught:
            sequence.read(40)
        assert caught.value.ranges == [range(40, 48)]
        assert [place.node for place in sequence.blocks()] == ["n0", "n0", "", "n0"]
        sequence.restore(32, floats[..., 32:48, :])
        assert np.array_equal(sequence.read(), floats)
        with pytest.raises(Refused, match="not whole blocks"):
            sequence.restore(33, floats[..., 33:48, :])


def test_another_session_that_became_the_writer_fences_this_one(room: Room, client: Client) -> None:
    sequence = room.sequence(FORM)
    sequence.append(ids(20), kv(20))
    opening = Opening(room, sequence.shape, [], 60.0)
    taken = opening.again(sequence.writer.home, client.deadline(None))
    assert taken.epoch == 2
    with pytest.raises(Conflict, match="another writer has taken sequence"):
        sequence.append([1], kv(1))
    sequence.writer.home.link.close()
    with pytest.raises(Conflict, match="another writer has taken sequence"):
        sequence.append([1], kv(1))  # not even from a session anew
    sequence.close()


LONG = 2 * BATCH_KEYS + 5  # blocks
ONE = Format("float32", block_tokens=1, layers=1, kv_heads=1, head_dim=2)


def put_blocks(room: Room, prompt: list[int], but: int = -1) -> Floats:
    """Every token is a shard of its own then, except one."""
    floats = kv(len(prompt), form=ONE)
    blocks = Outline(room.id, shape_of(ONE)).named(prompt)
    keys = [block.key for block in blocks if block.start != but]
    shards = [floats[..., b.start : b.end, :].tobytes() for b in blocks if b.start != but]
    assert set(room.put(keys, shards)) == {Status.OK}
    return floats


def test_a_context_of_more_blocks_than_a_call_takes_is_opened_whole(room: Room) -> None:
    prompt = ids(LONG)
    floats = put_blocks(room, prompt)
    with room.sequence(ONE, tokens=prompt) as sequence:
        assert sequence.length == sequence.sealed == LONG
        assert np.array_equal(sequence.read(LONG - 10), floats[..., -10:, :])
        assert sequence.append([1], kv(1, form=ONE)) == LONG + 1
        described = sequence.writer.home.describe(room.client.deadline(None))
        assert described.epoch == 1
        assert len(described.keys) == LONG + 1


@pytest.mark.parametrize("hole", [BATCH_KEYS - 1, BATCH_KEYS, 2 * BATCH_KEYS + 1])
def test_a_long_context_is_opened_up_to_its_first_hole(room: Room, hole: int) -> None:
    prompt = ids(LONG)
    put_blocks(room, prompt, but=hole)
    with room.sequence(ONE, tokens=prompt) as sequence:
        assert sequence.length == hole


def test_a_node_that_takes_no_further_blocks_opens_the_first_ones(
    room: Room, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier version does."""
    prompt = ids(LONG)
    put_blocks(room, prompt)

    def go_on(*_: object) -> None:
        raise Refused("a sequence that is resumed has its blocks; give no keys")

    monkeypatch.setattr(node.sequences, "go_on", go_on)
    with room.sequence(ONE, tokens=prompt) as sequence:
        assert sequence.length == BATCH_KEYS


def test_a_long_context_that_cannot_be_opened_whole_is_closed(
    room: Room, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ids(LONG)
    put_blocks(room, prompt)

    def go_on(*_: object) -> None:
        raise Retry("a failure that passes")

    monkeypatch.setattr(node.sequences, "go_on", go_on)
    with pytest.raises(Retry, match="a failure that passes"):
        room.sequence(ONE, tokens=prompt)
    assert not node.sequences.all
