"""Groups: what the requests of a known batch share is found over the fabric, and kept for it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from kvfabric.errors import FabricError
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Key, Status
from kvfabric_client.deadline import Deadline, milliseconds
from kvfabric_client.link import Link

if TYPE_CHECKING:
    from kvfabric_client.room import Room

CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Shared:
    """A key that two or more requests of the batch have."""

    key: Key
    index: int  # among the keys of all chains, one chain behind the other
    status: Status  # OK: at the home node, EXISTS: on another, MISS: to be computed once
    node: str  # empty: on none


class Group:
    """Made by `Room.group`. A context manager that closes."""

    def __init__(self, link: Link, number: int, shared: list[Shared], life_s: float) -> None:
        self.shared = shared
        self.life_s = life_s
        self._link = link
        self._number = number

    @property
    def missing(self) -> list[Key]:
        """Shared keys that nobody holds: computed by one of the requests, they serve all."""
        return [shared.key for shared in self.shared if shared.status is Status.MISS]

    def close(self, *, timeout_s: float = CLOSE_TIMEOUT_S) -> tuple[int, int]:
        """Lets everything go: (shards, bytes) that nobody else keeps now. Safe to repeat; a node
        that does not answer lets go at the end of the group's life."""
        number, self._number = self._number, 0
        if not number or not self._link.alive():
            return 0, 0
        request = node_pb2.CloseGroupRequest(group=number)
        deadline = Deadline.after(timeout_s)
        with contextlib.suppress(FabricError):
            answer = self._link.call("close_group", request, deadline.at_s).close_group_response
            return answer.shards, answer.size_bytes
        return 0, 0

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_group(
    room: Room, chains: Sequence[Sequence[Key]], life_s: float, deadline: Deadline
) -> Group:
    """See `Room.group`."""
    keys = [key for chain in chains for key in chain]
    request = node_pb2.OpenGroupRequest(
        namespace_id=room.id,
        keys=keys,
        lengths=[len(chain) for chain in chains],
        life_ms=milliseconds(life_s),
    )

    def call(link: Link) -> Group:
        link.open(room.namespace, room.id, deadline.at_s)
        answer = link.call("open_group", request, deadline.at_s).open_group_response
        columns = zip(answer.shared, answer.statuses, answer.nodes, strict=True)
        shared = [Shared(keys[index], index, Status(s), node) for index, s, node in columns]
        return Group(link, answer.group, shared, answer.life_ms / 1000)

    return room.client.at_home(call, deadline)
