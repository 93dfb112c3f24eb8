"""The books of a sequence's writer, and how KV lies in blocks: pure."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfabric.errors import Conflict, Refused
from kvfabric.keys import chain, shard_key
from kvfabric.types import Format, NamespaceId, Part
from kvfabric_client.blocks import layer_range, shape_of, source_of
from kvfabric_client.outline import Outline, checked_ids

SPACE = NamespaceId(b"n" * 32)
FORM = Format("float32", block_tokens=4, layers=3, kv_heads=2, head_dim=5)


def outline(form: Format = FORM) -> Outline:
    return Outline(SPACE, shape_of(form))


def sealed(tokens: int) -> Outline:
    """With all full blocks sealed."""
    books = outline()
    books.append(0, checked_ids(range(tokens)), None)
    books.seal(books.next_blocks())
    return books


@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=40), st.integers(0, 40))
def test_keys_follow_the_chain_rule_from_any_cut(ids: list[int], cut: int) -> None:
    books = outline()
    first = min(cut, len(ids))
    for part in (ids[:first], ids[first:]):
        books.append(books.length, checked_ids(part), None)
        books.seal(books.next_blocks())
        books.check()
    full = len(ids) // 4
    links = list(chain([ids[4 * i : 4 * i + 4] for i in range(full)]))
    parts = [Part(4 * i, 4, 0, 3, 0, 2) for i in range(full)]
    expected = [shard_key(SPACE, link, part) for link, part in zip(links, parts, strict=True)]
    assert [block.key for block in books.blocks] == expected
    assert [block.key for block in outline().named(checked_ids(ids))] == expected


@given(st.integers(0, 2**32), st.integers(1, 30))
def test_any_history_leaves_the_books_in_order(seed: int, steps: int) -> None:
    chance = random.Random(seed)
    books = outline()
    for _ in range(steps):
        action = chance.choice(["all", "layer", "short", "cut", "fork"])
        if action == "all" and len(set(books.visible)) == 1:
            start = books.start_of(None)
            books.append(start, checked_ids([chance.randrange(9)] * chance.randrange(7)), None)
        elif action == "layer":
            layer = chance.randrange(3)
            start = books.start_of(layer)
            known = list(books.tokens[start:])
            books.append(start, checked_ids(known or [chance.randrange(9)]), layer)
        elif action == "short" and len(set(books.visible)) == 1:
            books.seal(books.next_blocks(short=True))
            assert books.sealed == books.length
        elif action == "cut":
            books.truncate(chance.randint(0, books.length))
        elif action == "fork":
            books = books.fork(books.length)
        books.seal(books.next_blocks())
        books.check()
        assert books.blocks_for(max(books.visible)) * 4 >= max(books.visible) - books.sealed
        pieces = books.sealed_pieces(0, books.length)
        opened = list(books.open_pieces(books.sealed, books.length))
        at = 0
        for piece in [*pieces, *opened]:
            assert piece.start == at
            at = piece.end
        assert at == books.length


def test_what_the_node_sealed_unknown_to_us_is_taken_over() -> None:
    ours, theirs = sealed(7), sealed(7)
    ours.append(7, checked_ids([7, 8]), None)
    theirs.append(7, checked_ids([7, 8]), None)
    theirs.seal(theirs.next_blocks(short=True))
    said = [(block.key, block.tokens) for block in theirs.blocks]
    assert [tokens for _, tokens in said] == [4, 4, 1]
    ours.align([key for key, _ in said], [tokens for _, tokens in said])
    assert ours.blocks == theirs.blocks
    ours.align([said[0][0]], [4])  # it has lost some
    assert ours.blocks == theirs.blocks[:1]
    with pytest.raises(Conflict, match="holds other blocks"):
        ours.align([b"k" * 32], [4])
    with pytest.raises(Conflict, match="not written here"):
        ours.align([said[0][0], b"k" * 32], [4, 4])


def test_tokens_that_layers_disagree_about_are_refused() -> None:
    books = outline()
    books.append(0, checked_ids([1, 2, 3]), 0)
    books.check_tokens(0, checked_ids([1, 2, 3, 4]))
    with pytest.raises(Refused, match="other token ids"):
        books.check_tokens(1, checked_ids([2, 4]))
    with pytest.raises(Refused, match="layers reach from token 0 to 3"):
        books.start_of(None)


@pytest.mark.parametrize("ids", [[1.5], [-1], [1 << 32], [[1]], ["a"]])
def test_what_is_no_token_id_is_refused(ids: list[object]) -> None:
    with pytest.raises(Refused, match="token ids"):
        checked_ids(ids)


@given(
    lo=st.integers(0, 3), tokens=st.integers(1, 4), start=st.integers(0, 5), layer=st.integers(0, 2)
)
def test_kv_is_placed_where_the_format_says(lo: int, tokens: int, start: int, layer: int) -> None:
    shape = shape_of(FORM)
    hi = min(4, lo + tokens)
    kv = np.random.default_rng(0).random((3, 2, 2, 9, 5), dtype=np.float32)
    block = np.zeros(shape.size_bytes, np.uint8)
    plain = block.view(np.float32).reshape(3, 2, 2, 4, 5)  # K then V, each [heads, tokens, dim]
    source_of(shape, kv, 9, None).place(shape, block, lo, hi, start)
    assert np.array_equal(plain[..., lo:hi, :], kv[..., start : start + hi - lo, :])
    assert not plain[..., :lo, :].any()
    assert not plain[..., hi:, :].any()
    block[:] = 0
    pair = (kv[layer, 0], kv[layer, 1])
    source_of(shape, pair, 9, layer).place(shape, block, lo, hi, start)
    assert np.array_equal(plain[layer, ..., lo:hi, :], kv[layer, ..., start : start + hi - lo, :])
    others = [other for other in range(3) if other != layer]
    assert not plain[others].any()
    runs = list(shape.tail_runs(lo, hi, range(layer, layer + 1)))
    covered = np.zeros(shape.size_bytes, bool)
    for offset, size_bytes in runs:
        assert not covered[offset : offset + size_bytes].any()
        covered[offset : offset + size_bytes] = True
    inside = np.zeros((3, 2, 2, 4, 5), bool)
    inside[layer, ..., lo:hi, :] = True
    assert np.array_equal(covered.reshape(-1, 4).all(axis=1), inside.reshape(-1))


def test_latents_have_one_plane_and_one_head() -> None:
    shape = shape_of(Format("float32", 4, layers=3, head_dim=5, kind="mla"))
    assert (shape.size_bytes, shape.planes, shape.format.kind) == (3 * 4 * 5 * 4, 1, "mla")
    latents = np.random.default_rng(0).random((3, 1, 1, 6, 5), dtype=np.float32)
    block = np.zeros(shape.size_bytes, np.uint8)
    source_of(shape, latents, 6, None).place(shape, block, 0, 4, 2)
    assert np.array_equal(block.view(np.float32).reshape(3, 4, 5), latents[:, 0, 0, 2:])
    source_of(shape, (latents[1, 0],), 6, 1).place(shape, block, 1, 2, 0)
    assert np.array_equal(block.view(np.float32).reshape(3, 4, 5)[1, 1], latents[1, 0, 0, 0])
    with pytest.raises(Refused, match="give one array of latents"):
        source_of(shape, (latents[1, 0], latents[1, 0]), 6, 1)


def test_shapes_that_do_not_fit_together_are_refused() -> None:
    raw = shape_of(Format("float16", 8, "vllm-cpu-vec", 4, 2, 64), size_bytes=4096)
    assert (raw.plain, raw.layers, raw.block_tokens, raw.heads) == (False, 4, 8, 2)
    part = shape_of(FORM, layers=1, first_layer=2, heads=1, first_head=1)
    assert (part.size_bytes, part.first_layer, part.first_head) == (2 * 4 * 5 * 4, 2, 1)
    for mistake in (
        {"form": None, "size_bytes": 10, "layers": 3, "block_tokens": 4},
        {"form": None, "size_bytes": 12, "layers": 3},
        {"form": FORM, "size_bytes": 12},
        {"form": FORM, "block_tokens": 5},
        {"form": Format("int7", 4)},
        {"form": Format("float32", 4, kind="state")},
        {"form": Format("float32", 0)},
        {"form": Format("float32", 4, kv_heads=2, head_dim=8, kind="mla")},
    ):
        with pytest.raises(Refused):
            shape_of(**mistake)
    with pytest.raises(Refused, match="give a run"):
        layer_range(shape_of(FORM), range(2, 4))
