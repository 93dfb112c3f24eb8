"""Random attention work over blocks that lie scattered, each right before memory that faults."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention import oracle
from kvfabric.attention.floats import narrowed, widened
from kvfabric.attention.masks import Sight, sight
from kvfabric.attention.merge import Partial
from kvfabric.attention.shape import AttentionShape, attention_shape
from kvfabric.types import Format
from kvfabric_nodes.attention.kernels import Work

PAGE = mmap.PAGESIZE
PROT_NONE = 0


@dataclass(frozen=True, slots=True)
class Case:
    """What one work is made of; everything else comes from `seed`."""

    seed: int = 0
    dtype: str = "float32"
    query_dtype: str = ""
    kv_heads: int = 2
    group: int = 2
    dim: int = 16
    value_dim: int = 0  # not 0: MLA latents
    block_tokens: int = 8
    pieces: tuple[tuple[int, int], ...] = ((0, 8), (8, 16), (16, 20))  # positions in each
    rows: int = 1
    positions: tuple[int, ...] = ()
    visible: int = 20
    window: int = 0
    sinks: int = 0
    softcap: float = 0.0
    spread: float = 1.0  # of the logits


@dataclass(slots=True)
class Scattered:
    """A work, what it should come to, and the memory that it is over."""

    work: Work
    expected: Partial
    memory: list[Any] = field(default_factory=list)  # keeps the mappings


def scattered(case: Case) -> Scattered:
    """Every piece ends where its page does; the next page may not be touched."""
    random = np.random.default_rng(case.seed)
    form = Format(
        case.dtype,
        case.block_tokens,
        kv_heads=case.kv_heads,
        head_dim=case.dim,
        kind="mla" if case.value_dim else "kv",
    )
    shape = attention_shape(form, case.value_dim)
    blocks, memory = [], []
    for first, end in case.pieces:
        planes = (1 if case.value_dim else 2, case.kv_heads, case.block_tokens, case.dim)
        content = narrowed(random.normal(size=planes).astype(np.float32), case.dtype)
        guarded = _Guarded(shape.layer_bytes)
        memory.append(guarded)
        guarded.array[:] = np.frombuffer(content.tobytes(), np.uint8)
        inside = int(random.integers(0, case.block_tokens - (end - first) + 1))
        blocks.append((content, guarded.address, inside, first, end))
    order = random.permutation(len(blocks))  # as a table may have them
    blocks = [blocks[i] for i in order]
    queries = random.normal(size=(case.rows, case.kv_heads * case.group, case.dim)) * case.spread
    query_dtype = case.query_dtype or case.dtype
    stored = narrowed(queries.astype(np.float32), query_dtype)
    seen = sight(case.rows, case.positions, case.visible, case.window, case.sinks)
    scale = case.dim**-0.5
    work = _work(shape, blocks, stored, query_dtype, seen, scale, case.softcap)
    expected = _expected(shape, blocks, widened(stored, query_dtype), seen, scale, case)
    return Scattered(work, expected, memory)


def _work(
    shape: AttentionShape,
    blocks: list[Any],
    queries: NDArray[Any],
    query_dtype: str,
    seen: Sight,
    scale: float,
    softcap: float,
) -> Work:
    keys = [address + inside * shape.key_token_stride for _, address, inside, _, _ in blocks]
    values = [
        address + shape.value_offset + inside * shape.value_token_stride
        for _, address, inside, _, _ in blocks
    ]
    return Work(
        shape,
        np.array(keys, np.int64),
        np.array(values, np.int64),
        np.array([end - first for *_, first, end in blocks], np.int32),
        np.array([first for *_, first, _ in blocks], np.int64),
        np.ascontiguousarray(queries),
        query_dtype,
        seen,
        scale,
        softcap,
    )


def _expected(
    shape: AttentionShape,
    blocks: list[Any],
    queries: NDArray[Any],
    seen: Sight,
    scale: float,
    case: Case,
) -> Partial:
    """The oracle, over the blocks' own arrays: it shares nothing with the addresses above."""
    keys: list[NDArray[Any]] = [np.zeros((0, shape.kv_heads, shape.key_dim))]
    values: list[NDArray[Any]] = [np.zeros((0, shape.kv_heads, shape.value_dim))]
    positions: list[NDArray[Any]] = [np.zeros(0, np.int64)]
    for content, _, inside, first, end in blocks:
        wide = widened(content, case.dtype)[:, :, inside : inside + end - first]
        keys.append(wide[0].transpose(1, 0, 2))
        values.append(wide[-1].transpose(1, 0, 2)[..., : shape.value_dim])
        positions.append(np.arange(first, end))
    k, v, at = (np.concatenate(each) for each in (keys, values, positions))
    return oracle.attend(queries, k, v, at, seen, scale, case.softcap)


class _Guarded:
    """Memory whose last byte is followed by a page that faults, and its first byte preceded."""

    def __init__(self, size_bytes: int) -> None:
        pages = -(-size_bytes // PAGE)
        self.map = mmap.mmap(-1, (pages + 2) * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.address = base + (pages + 1) * PAGE - size_bytes
        self.array = np.frombuffer(self.map, np.uint8)[self.address - base :][:size_bytes]
        libc = ctypes.CDLL(None, use_errno=True)
        for page in (0, pages + 1):
            guard = ctypes.c_void_p(base + page * PAGE)
            assert libc.mprotect(guard, ctypes.c_size_t(PAGE), PROT_NONE) == 0
