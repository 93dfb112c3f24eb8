"""Groups: what the requests of a known batch share is found over the fabric, and kept for it.

What they share is found here, so that a node is told of nothing else, however long the chains.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfabric.errors import FabricError
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import BATCH_KEYS, Key, Status
from kvfabric_client.closing import Closing
from kvfabric_client.deadline import Deadline, milliseconds
from kvfabric_client.link import Link

if TYPE_CHECKING:
    from kvfabric_client.room import Room

CLOSE_TIMEOUT_S = 2.0
MAX_KEYS = BATCH_KEYS // 2  # of one group of a node; more become several


@dataclass(frozen=True, slots=True)
class Shared:
    """A key that two or more requests of the batch have."""

    key: Key
    index: int  # among the keys of all chains, one chain behind the other
    status: Status  # OK: at the home node, EXISTS: on another, MISS: to be computed once
    node: str  # empty: on none


class Group(Closing):
    """Made by `Room.group`. A context manager that closes."""

    def __init__(self, link: Link) -> None:
        self.shared: list[Shared] = []
        self.life_s = 0.0
        self._link = link
        self._numbers: list[int] = []

    @property
    def missing(self) -> list[Key]:
        """Shared keys that nobody holds: computed by one of the requests, they serve all."""
        return [shared.key for shared in self.shared if shared.status is Status.MISS]

    def add(
        self, room: Room, keys: Sequence[Key], indices: Sequence[int], life_s: float, until_s: float
    ) -> None:
        """Has the node keep more keys, at most half a batch: it counts each from two chains."""
        request = node_pb2.OpenGroupRequest(
            namespace_id=room.id,
            keys=[*keys, *keys],
            lengths=[len(keys), len(keys)],
            life_ms=milliseconds(life_s),
        )
        answer = self._link.call("open_group", request, until_s).open_group_response
        self._numbers.append(answer.group)
        self.life_s = answer.life_ms / 1000
        for position, status, node in zip(
            answer.shared, answer.statuses, answer.nodes, strict=True
        ):
            self.shared.append(Shared(keys[position], indices[position], Status(status), node))

    def close(self, *, timeout_s: float = CLOSE_TIMEOUT_S) -> tuple[int, int]:
        """Lets everything go. What came meanwhile and nobody else keeps is freed: (shards, bytes);
        what was there before is cache again. Safe to repeat; a node that does not answer lets go
        at the end of the group's life."""
        numbers, self._numbers = self._numbers, []
        shards = size_bytes = 0
        deadline = Deadline.after(timeout_s)
        for number in numbers if self._link.alive() else ():
            request = node_pb2.CloseGroupRequest(group=number)
            with contextlib.suppress(FabricError):
                frame = self._link.call("close_group", request, deadline.at_s)
                shards += frame.close_group_response.shards
                size_bytes += frame.close_group_response.size_bytes
        return shards, size_bytes


def open_group(
    room: Room, chains: Sequence[Sequence[Key]], life_s: float, deadline: Deadline
) -> Group:
    """See `Room.group`."""
    indices = shared_indices(chains)
    keys = list(itertools.chain.from_iterable(chains))

    def call(link: Link) -> Group:
        link.open(room.namespace, room.id, deadline.at_s)
        group = Group(link)
        try:
            for start in range(0, len(indices), MAX_KEYS):
                some = indices[start : start + MAX_KEYS]
                group.add(room, [keys[index] for index in some], some, life_s, deadline.at_s)
        except BaseException:
            group.close()
            raise
        return group

    return room.client.at_home(call, deadline)


def shared_indices(chains: Sequence[Sequence[Key]]) -> list[int]:
    """Of the keys that two or more chains have, once each: where each is first, counted over
    all chains, one behind the other."""
    first: dict[Key, int] = {}
    chains_with: Counter[Key] = Counter()
    start = 0
    for chain in chains:
        for index, key in enumerate(chain, start):
            first.setdefault(key, index)
        chains_with.update(set(chain))
        start += len(chain)
    return [index for key, index in first.items() if chains_with[key] > 1]
