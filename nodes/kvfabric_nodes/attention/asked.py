"""What an attend asks for, checked, and matched with what lies here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfabric.attention.floats import STORED
from kvfabric.attention.masks import Sight, seen, sight, within
from kvfabric.attention.shape import AttentionShape
from kvfabric.errors import Refused
from kvfabric.rpc.v1 import node_pb2
from kvfabric_nodes.attention.kernels import Work
from kvfabric_nodes.attention.pieces import Blocks, Cut, Longs, Pieces, Range, View, cut
from kvfabric_nodes.attention.spans import MAX_POSITION

MAX_QUERIES = 1024
MAX_VECTORS_BYTES = 512 << 10
MAX_OUTPUTS_BYTES = 960 << 10
MAX_VIEWS = 4  # that blocks remember
MAX_NAME_BYTES = 4096  # of a query whose view is remembered

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Options:
    """What queries have in common that one kernel call computes."""

    shape: AttentionShape
    layer: int
    query_heads: int
    query_dtype: str
    scale: float
    softcap: float
    sinks: int


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """One request's rows over what lies here of its span. `vectors`: [rows, query heads, dim]."""

    vectors: Array
    sight: Sight
    here: Cut


def options_of(request: node_pb2.AttendRequest, shape: AttentionShape) -> Options:
    """Refused for what no kernel computes."""
    check_layer(request.layer, shape)
    shape.check_heads(request.query_heads)
    if not math.isfinite(request.scale) or not request.scale:
        raise Refused(f"scale {request.scale}: name a number, as 1 / sqrt(key dimension)")
    if not 0 <= request.softcap < math.inf:
        raise Refused(f"softcap {request.softcap}: name a number above 0, or 0 for none")
    return Options(
        shape,
        request.layer,
        request.query_heads,
        query_dtype(request.dtype, shape),
        request.scale,
        request.softcap,
        request.sinks if request.window else 0,
    )


def check_layer(layer: int, shape: AttentionShape) -> None:
    if layer >= shape.layers:
        raise Refused(f"layer {layer} of blocks that have {shape.layers}, counted from 0")


def query_dtype(dtype: str, shape: AttentionShape) -> str:
    if dtype not in ("", shape.dtype, "float32"):
        raise Refused(f"queries of {dtype!r} over KV of {shape.dtype}; give that, or float32")
    return dtype or shape.dtype


def check_queries(queries: Sequence[node_pb2.SpanQuery]) -> None:
    if not 0 < len(queries) <= MAX_QUERIES:
        raise Refused(f"{len(queries)} queries in a call; give 1 to {MAX_QUERIES}")
    for index, query in enumerate(queries):
        if not query.rows:
            raise Refused(f"query {index} has no rows")


def vectors_of(
    data: bytes, queries: Sequence[node_pb2.SpanQuery], heads: int, dim: int, dtype: str
) -> list[Array]:
    """Of each query its rows, [rows, heads, dim], as `STORED[dtype]`."""
    kind = np.dtype(STORED[dtype])
    rows = sum(query.rows for query in queries)
    wanted = rows * heads * dim * kind.itemsize
    if len(data) != wanted:
        raise Refused(
            f"{len(data)} bytes of vectors, but {rows} rows of {heads} heads of {dim} {dtype} "
            f"are {wanted}"
        )
    if wanted > MAX_VECTORS_BYTES:
        raise Refused(f"{wanted} bytes of vectors; a call has at most {MAX_VECTORS_BYTES}")
    vectors = np.frombuffer(data, kind).reshape(rows, heads, dim)
    ends = itertools.accumulate((query.rows for query in queries), initial=0)
    return [vectors[first:end] for first, end in itertools.pairwise(ends)]


def check_outputs(rows: int, heads: int, dim: int) -> None:
    size_bytes = rows * heads * (dim + 1) * 4
    if size_bytes > MAX_OUTPUTS_BYTES:
        raise Refused(
            f"{rows} rows of {heads} heads of {dim} give {size_bytes} bytes of float32; an "
            f"answer has at most {MAX_OUTPUTS_BYTES}: ask in several calls"
        )


def sight_of(query: node_pb2.SpanQuery, window: int, sinks: int) -> Sight:
    far = max([query.visible, *query.positions])
    if far > MAX_POSITION:
        raise Refused(f"position {far}; the limit is {MAX_POSITION}")
    return sight(query.rows, list(query.positions), query.visible, window, sinks)


def ranges_of(query: node_pb2.SpanQuery, otherwise: Sequence[Range]) -> Sequence[Range]:
    """The ranges that it names, or else these."""
    bounds = list(query.ranges)
    if not bounds:
        return otherwise
    ranges = list(zip(bounds[::2], bounds[1::2], strict=False))
    ascending = all(end <= first for (_, end), (first, _) in itertools.pairwise(ranges))
    if len(bounds) % 2 or not ascending or not all(first < end for first, end in ranges):
        raise Refused("ranges are pairs of a first token and an end, ascending, without overlap")
    if bounds[-1] > MAX_POSITION:
        raise Refused(f"a range up to {bounds[-1]}; the limit is {MAX_POSITION}")
    return ranges


def ranges_ahead(
    query: node_pb2.SpanQuery, own: Sequence[Range], *, open_ended: bool
) -> tuple[list[Range], bool]:
    """What such a query asks for when it sees further, and whether that has no end: where its
    ranges, or else its `own`, ended with what it saw."""
    ranges = list(ranges_of(query, own))
    ends = bool(ranges) and (ranges[-1][1] == query.visible if query.ranges else open_ended)
    if ends:
        ranges[-1] = (ranges[-1][0], MAX_POSITION)
    return ranges, ends


def asked(
    vectors: Array,
    query: node_pb2.SpanQuery,
    blocks: Blocks,
    otherwise: Callable[[int], Sequence[Range]],
    window: int = 0,
    sinks: int = 0,
) -> Asked:
    """`otherwise`: the ranges of a query that names none, and sees tokens before this one."""
    name = (query.SerializeToString(), window, sinks)
    view = blocks.views.get(name)
    if view is None:
        view = _view(query, blocks, otherwise, window, sinks)
        if len(name[0]) <= MAX_NAME_BYTES:
            while len(blocks.views) >= MAX_VIEWS:
                del blocks.views[next(iter(blocks.views))]
            blocks.views[name] = view
    return Asked(vectors, view.sight, view.here)


def _view(
    query: node_pb2.SpanQuery,
    blocks: Blocks,
    otherwise: Callable[[int], Sequence[Range]],
    window: int,
    sinks: int,
) -> View:
    """What no row sees is neither read nor missed."""
    sight = sight_of(query, window, sinks)
    ranges = ranges_of(query, otherwise(query.visible))
    return View(sight, cut(blocks, within(ranges, seen(sight))))


def begins(shape: AttentionShape, layer: int, pieces: Pieces, *, values: bool) -> Longs:
    """The address of each piece's first key or value, of KV head 0. Pieces have one shape."""
    first = pieces.begins.get(values)
    if first is None:
        stride = shape.value_token_stride if values else shape.key_token_stride
        first = pieces.address + pieces.skipped * stride + (shape.value_offset if values else 0)
        pieces.begins[values] = first
    return first + layer * shape.layer_bytes


def work(options: Options, rows: Sequence[Asked], pieces: Pieces) -> Work:
    """All rows of these over the same pieces."""
    shape, layer = options.shape, options.layer
    return Work(
        shape=shape,
        keys=begins(shape, layer, pieces, values=False),
        values=begins(shape, layer, pieces, values=True),
        tokens=pieces.counts,
        first=pieces.first,
        queries=_joined([one.vectors for one in rows]),
        query_dtype=options.query_dtype,
        sight=Sight(
            _joined([one.sight.lo for one in rows]),
            _joined([one.sight.hi for one in rows]),
            options.sinks,
        ),
        scale=options.scale,
        softcap=options.softcap,
    )


def _joined(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
