"""Which shards are read much, and by whom: decaying sums of what nodes report, bounded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kvfabric.errors import Broken
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import DIGEST_BYTES, Key, NamespaceId, NodeId

WINDOW_S = 60.0  # a read counts for about so long
MAX_SHARDS = 16_384
FORGET_READS = 0.5  # less than that within the window is nothing


@dataclass(slots=True)
class _Warmth:
    at_s: float
    reads: float = 0.0
    asked: dict[NodeId, float] = field(default_factory=dict)  # by who wanted to know where it is


class Heat:
    """See the module. A rate that is steady is told as it is after some windows."""

    def __init__(self) -> None:
        self._shards: dict[tuple[NamespaceId, Key], _Warmth] = {}

    def report(self, heat: control_pb2.Heat, now_s: float) -> None:
        """What one node's shards were read since it told last."""
        for at, (namespace, reads) in enumerate(zip(heat.namespace_id, heat.reads, strict=True)):
            key = Key(heat.keys[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES])
            self._now(NamespaceId(namespace), key, now_s, new=True).reads += reads
        if len(self._shards) > MAX_SHARDS:
            self._shrink(now_s)

    def asked(
        self, namespace: NamespaceId, keys: Iterable[Key], node: NodeId, now_s: float
    ) -> None:
        """`node` wanted to know where these lie: its clients read them. Counts known ones only."""
        for key in keys:
            if (namespace, key) in self._shards:
                asked = self._now(namespace, key, now_s).asked
                asked[node] = asked.get(node, 0.0) + 1

    def rate(self, namespace: NamespaceId, key: Key, now_s: float) -> float:
        """Reads per second over all replicas; 0 for a shard that is not known to be read."""
        known = self._shards.get((namespace, key))
        if known is None:
            return 0.0
        reads = known.reads * math.exp((known.at_s - now_s) / WINDOW_S)
        return reads / WINDOW_S if reads >= FORGET_READS else 0.0

    def askers(self, namespace: NamespaceId, key: Key) -> list[NodeId]:
        """Who asks for it, the keenest first."""
        known = self._shards.get((namespace, key))
        asked = known.asked if known else {}
        return sorted(asked, key=lambda node: (-asked[node], node))

    def __iter__(self) -> Iterator[tuple[NamespaceId, Key]]:
        """Every known shard, in no order that means anything."""
        return iter(list(self._shards))

    def check(self) -> None:
        """Broken unless it is bounded."""
        if len(self._shards) > MAX_SHARDS:
            raise Broken(f"the heat of {len(self._shards)} shards is over {MAX_SHARDS}: a bug")

    def _now(self, namespace: NamespaceId, key: Key, now_s: float, *, new: bool = False) -> _Warmth:
        known = self._shards.get((namespace, key))
        if known is None:
            assert new
            known = self._shards[namespace, key] = _Warmth(now_s)
        fading = math.exp((known.at_s - now_s) / WINDOW_S)
        known.reads *= fading
        known.asked = {node: count * fading for node, count in known.asked.items() if count > 0.01}
        known.at_s = now_s
        return known

    def _shrink(self, now_s: float) -> None:
        """Half of them go, the coldest."""
        order = sorted(self._shards, key=lambda each: (-self.rate(each[0], each[1], now_s), each))
        self._shards = {each: self._shards[each] for each in order[: MAX_SHARDS // 2]}
