"""How the KV of tokens lies in blocks: sizes, and strided views without a copy.

`plain` blocks are looked into: per layer K then V, each `[heads, tokens, head dim]`; of MLA a
layer has one plane, its latents, instead of the two. Blocks of any other packing are moved whole.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfabric.errors import Refused
from kvfabric.keys import shard_key
from kvfabric.types import Format, Key, NamespaceId, Part
from kvfabric_client.buffers import Pieces

Array = NDArray[Any]
Bytes = NDArray[np.uint8]

# Bytes of an element. Those that numpy has no type for are moved as unsigned integers.
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "uint8": 1,
    "float8_e4m3": 1,
    "float8_e5m2": 1,
}
BITS: dict[int, type[np.unsignedinteger[Any]]] = {
    1: np.uint8,
    2: np.uint16,
    4: np.uint32,
    8: np.uint64,
}


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Of the blocks of one sequence: one part (layers, KV heads) of a model's context."""

    size_bytes: int
    layers: int
    block_tokens: int
    first_layer: int = 0
    first_head: int = 0
    heads: int = 1
    head_dim: int = 0  # 0: a packing that is not looked into
    dtype: str = ""
    packing: str = "plain"
    kind: str = "kv"

    @property
    def plain(self) -> bool:
        return self.head_dim > 0

    @property
    def planes(self) -> int:
        """Of a layer: K and V, or the latents alone."""
        return 1 if self.kind == "mla" else 2

    @property
    def format(self) -> Format:
        """What these blocks are, with the layers and heads that they have."""
        return Format(
            self.dtype,
            self.block_tokens,
            self.packing,
            self.layers,
            self.heads,
            self.head_dim,
            self.kind,
        )

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    def key(self, namespace: NamespaceId, link: bytes, first_token: int, tokens: int) -> Key:
        part = Part(first_token, tokens, self.first_layer, self.layers, self.first_head, self.heads)
        return shard_key(namespace, link, part)

    def look(self, block: Bytes) -> Array:
        """A plain block as `[layers, planes, heads, tokens, head dim]` of unsigned integers."""
        return block.view(BITS[self.item_bytes]).reshape(
            self.layers, self.planes, self.heads, self.block_tokens, self.head_dim
        )

    def empty(self, tokens: int, layers: int) -> Array:
        """An array for the KV of so many tokens and layers, in the format's own type."""
        sizes = (layers, self.planes, self.heads, tokens, self.head_dim)
        return np.empty(sizes, dtype=self.array_type())

    def array_type(self) -> np.dtype[Any]:
        """Unsigned integers where numpy has no such type."""
        try:
            return np.dtype(self.dtype)
        except TypeError:
            return np.dtype(BITS[self.item_bytes])

    def tail_runs(self, lo: int, hi: int, layers: range) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of the pieces of a plain block that hold these tokens and layers."""
        row_bytes = self.head_dim * self.item_bytes
        plane_bytes = self.block_tokens * row_bytes
        planes = self.planes * self.heads
        if lo == 0 and hi == self.block_tokens:
            start = layers.start * planes * plane_bytes
            yield start, len(layers) * planes * plane_bytes
            return
        for plane in range(layers.start * planes, layers.stop * planes):
            yield plane * plane_bytes + lo * row_bytes, (hi - lo) * row_bytes


def shape_of(
    form: Format | None,
    *,
    size_bytes: int = 0,
    layers: int = 0,
    block_tokens: int = 0,
    first_layer: int = 0,
    first_head: int = 0,
    heads: int = 0,
) -> BlockShape:
    """The shape of a format's blocks, or of `size_bytes` bytes in a packing of one's own.

    `layers` and `heads` are those of this part, by default all of the format's. Refused where
    it does not fit together.
    """
    if form is None or form.packing != "plain":
        form = form or Format("", block_tokens, "", layers or 1, heads or 1)
        layers = layers or form.layers
        block_tokens = block_tokens or form.block_tokens
        if size_bytes <= 0 or block_tokens <= 0 or layers <= 0 or size_bytes % layers:
            raise Refused(
                f"blocks of {size_bytes} bytes, {layers} layers and {block_tokens} tokens; give "
                "size_bytes (a multiple of layers) and block_tokens, or a plain format"
            )
        parts = heads or form.kv_heads
        return BlockShape(
            size_bytes,
            layers,
            block_tokens,
            first_layer,
            first_head,
            parts,
            packing=form.packing,
            kind=form.kind,
        )
    layers, heads = layers or form.layers, heads or form.kv_heads
    if form.dtype not in ITEM_BYTES:
        raise Refused(f"dtype {form.dtype!r} is none of {', '.join(ITEM_BYTES)}")
    if form.kind not in ("kv", "window", "mla"):
        raise Refused(f"blocks of kind {form.kind!r} are not looked into; give size_bytes instead")
    if form.kind == "mla":
        heads = heads or 1
        if heads != 1:
            raise Refused(f"latents with {heads} heads; all query heads share one latent")
    if min(layers, heads, form.head_dim, form.block_tokens) <= 0:
        raise Refused(f"{form} has a dimension of 0; a plain block needs all of them")
    planes = 1 if form.kind == "mla" else 2
    whole = layers * planes * heads * form.block_tokens * form.head_dim * ITEM_BYTES[form.dtype]
    if (size_bytes or whole) != whole or (block_tokens or form.block_tokens) != form.block_tokens:
        raise Refused(
            f"{form} makes blocks of {form.block_tokens} tokens and {whole} bytes, not "
            f"{block_tokens} and {size_bytes}; leave these out"
        )
    return BlockShape(
        whole,
        layers,
        form.block_tokens,
        first_layer,
        first_head,
        heads,
        form.head_dim,
        form.dtype,
        kind=form.kind,
    )


@dataclass(frozen=True, slots=True)
class Source:
    """The KV of some tokens as its caller has it: (where in a block, array) pairs."""

    planes: list[tuple[Any, Array]]
    tokens: int

    def place(self, shape: BlockShape, block: Bytes, lo: int, hi: int, start: int) -> None:
        """Copies the tokens from `start` on into a block's tokens `lo` to `hi`."""
        inside = shape.look(block)
        for where, array in self.planes:
            np.copyto(inside[where][..., lo:hi, :], array[..., start : start + hi - lo, :])


@dataclass(frozen=True, slots=True)
class RawSource:
    """Whole blocks in a packing that is not looked into."""

    blocks: list[Pieces]

    def place(self, shape: BlockShape, block: Bytes, lo: int, hi: int, start: int) -> None:
        """As `Source.place`; `start` is a block's first token."""
        at = 0
        for piece in self.blocks[start // shape.block_tokens].arrays:
            np.copyto(block[at : at + len(piece)], piece)
            at += len(piece)


def source_of(shape: BlockShape, kv: Any, tokens: int, layer: int | None) -> Source:
    """`kv`: all layers as one array `[layers, planes, heads, tokens, head dim]`, or a list with
    one entry per layer, each `[planes, heads, tokens, head dim]` or a tuple of the planes, which
    is (K, V) or (latents,); with `layer` just that entry. Arrays may be numpy's or torch's, with
    any strides. Refused for another shape.
    """
    heads_shape = (shape.heads, tokens, shape.head_dim)
    if layer is not None:
        if not 0 <= layer < shape.layers:
            raise Refused(f"layer {layer} of {shape.layers}; layers count from 0 in each part")
        return Source(_planes_of(shape, kv, layer, heads_shape), tokens)
    if isinstance(kv, (list, tuple)):
        if len(kv) != shape.layers:
            raise Refused(f"{len(kv)} entries for {shape.layers} layers; give one per layer")
        planes = [p for i, one in enumerate(kv) for p in _planes_of(shape, one, i, heads_shape)]
        return Source(planes, tokens)
    whole = _bits_of(shape, kv, (shape.layers, shape.planes, *heads_shape))
    return Source([(slice(None), whole)], tokens)


def raw_source(shape: BlockShape, blocks: Any, tokens: int, layer: int | None) -> RawSource:
    """Refused unless these are the bytes of all blocks of so many tokens, all layers."""
    if layer is not None:
        raise Refused("blocks of a packing of one's own come whole; leave `layer` out")
    pieces = [Pieces(block) for block in blocks]
    sizes = {piece.size_bytes for piece in pieces} - {shape.size_bytes}
    if sizes or tokens != len(pieces) * shape.block_tokens:
        raise Refused(
            f"{tokens} tokens in {len(pieces)} blocks (of other sizes: {sorted(sizes)}); give "
            f"whole blocks of {shape.block_tokens} tokens and {shape.size_bytes} bytes"
        )
    return RawSource(pieces)


def _planes_of(
    shape: BlockShape, kv: Any, layer: int, heads_shape: tuple[int, int, int]
) -> list[tuple[Any, Array]]:
    if isinstance(kv, (list, tuple)):
        if len(kv) != shape.planes:
            what = "K and V" if shape.planes == 2 else "one array of latents"
            raise Refused(f"{len(kv)} arrays for layer {layer}; give {what}")
        return [((layer, i), _bits_of(shape, one, heads_shape)) for i, one in enumerate(kv)]
    return [(layer, _bits_of(shape, kv, (shape.planes, *heads_shape)))]


def _bits_of(shape: BlockShape, value: Any, expected: tuple[int, ...]) -> Array:
    """The array as unsigned integers of its elements' size, over the same memory."""
    array = strided_tensor(value) if hasattr(value, "data_ptr") else _as_array(shape, value)
    if array.shape != expected:
        raise Refused(
            f"KV of shape {list(array.shape)} where {list(expected)} is appended "
            "([..., heads, tokens, head dim]); transpose or cut it"
        )
    named = _name_of(array.dtype)
    if array.dtype.itemsize != shape.item_bytes or (
        array.dtype.kind in "fi" and named in ITEM_BYTES and named != shape.dtype
    ):
        raise Refused(f"KV of {named} in blocks of {shape.dtype}; convert it first")
    return array.view(BITS[shape.item_bytes])


@lru_cache
def _name_of(dtype: np.dtype[Any]) -> str:
    return dtype.name  # numpy makes it anew each time


def _as_array(shape: BlockShape, value: Any) -> Array:
    if isinstance(value, np.ndarray):
        return value
    try:
        flat = np.frombuffer(memoryview(value).cast("B"), dtype=BITS[shape.item_bytes])
    except (TypeError, ValueError) as error:
        raise Refused(
            f"a {type(value).__name__} is no KV: {error}; give an array, a tensor or bytes"
        ) from error
    planes = flat.size // max(1, shape.heads * shape.head_dim)
    raise Refused(
        f"{flat.nbytes} bytes without a shape ({planes} rows of all heads); wrap them in numpy: "
        "np.frombuffer(...).reshape(layers, planes, heads, tokens, head_dim)"
    )


def strided_tensor(tensor: Any) -> Array:
    """A torch tensor in CPU memory, without importing torch."""
    if tensor.device.type != "cpu":
        raise Refused(f"a tensor on {tensor.device} cannot be moved; call .cpu() first")
    item_bytes = tensor.element_size()
    kinds = {"torch." + name: name for name in ITEM_BYTES}
    name = kinds.get(str(tensor.dtype), "")
    try:
        dtype = np.dtype(name or BITS[item_bytes])
    except TypeError:
        dtype = np.dtype(BITS[item_bytes])
    sizes, strides = tuple(tensor.shape), tuple(tensor.stride())
    span = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
    span = span if all(sizes) else 0
    memory = (ctypes.c_ubyte * (span * item_bytes)).from_address(tensor.data_ptr())
    return np.ndarray(
        sizes, dtype, memory, strides=tuple(stride * item_bytes for stride in strides)
    )


def target_of(shape: BlockShape, target: Any, tokens: int, layers: int) -> Array:
    """A caller's array or tensor to be filled, as unsigned integers. Refused as `source_of`."""
    bits = _bits_of(shape, target, (layers, shape.planes, shape.heads, tokens, shape.head_dim))
    if not bits.flags.writeable:
        raise Refused(f"a read-only {type(target).__name__} cannot be read into; copy it first")
    return bits


def layer_range(shape: BlockShape, layers: range | None) -> range:
    """Refused where it is not a run of this part's layers."""
    chosen = range(shape.layers) if layers is None else layers
    if chosen.step != 1 or not 0 <= chosen.start < chosen.stop <= shape.layers:
        raise Refused(f"layers {chosen} of {shape.layers}; give a run such as range(0, 4)")
    return chosen
