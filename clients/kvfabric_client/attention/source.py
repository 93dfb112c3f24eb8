"""A sequence as a context to be attended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfabric.errors import Conflict, Refused, Retry
from kvfabric.logs import guest_logger
from kvfabric_client.attention.route import HOME
from kvfabric_client.attention.runs import Runs
from kvfabric_client.blocks import Array, BlockShape
from kvfabric_client.deadline import Deadline
from kvfabric_client.outline import Sealed
from kvfabric_client.sequence_writer import Writer

if TYPE_CHECKING:
    from kvfabric_client.room import Room

log = guest_logger(__name__)


@dataclass(frozen=True, slots=True)
class SequenceSource:
    """A `Source`. Its home attends the open blocks, too."""

    writer: Writer

    @property
    def room(self) -> Room:
        return self.writer.room

    @property
    def shape(self) -> BlockShape:
        return self.writer.shape

    @property
    def blocks(self) -> Sequence[Sealed]:
        return self.writer.outline.blocks

    @property
    def home(self) -> str:
        return self.writer.home.address

    @property
    def sequence(self) -> int:
        return self.writer.home.sequence

    def take_cut(self) -> bool:
        return self.writer.outline.take_cut()

    def opened(
        self, runs: Runs, layer: int, patience: Callable[[], Deadline]
    ) -> Iterator[tuple[int, Array]]:
        home, shape = self.writer.home, self.shape
        for first, end in runs:
            for piece in self.writer.outline.open_pieces(first, end):
                inside = shape.look(home.tails.blocks[piece.index])
                mine = inside[layer, ..., piece.lo : piece.hi, :]
                yield piece.start, home.within(mine.copy, patience())

    def named(self, indices: Sequence[int], deadline: Deadline) -> list[str | None]:
        home, client = self.writer.home, self.writer.room.client
        try:
            said = home.describe(deadline, range(indices[0], indices[-1] + 1))
        except (Retry, Refused, Conflict) as error:
            log.debug("not_described", node=home.node, why=str(error))
            return [None] * len(indices)
        places: dict[str, str | None] = {"": None, home.node: HOME}
        for node in set(said.nodes) - places.keys():
            places[node] = client.address_of(node, deadline) or None
        by_key = dict(zip(said.keys, said.nodes, strict=True))
        return [places[by_key.get(self.blocks[index].key, "")] for index in indices]
