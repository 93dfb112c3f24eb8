"""What comes back from attending, and what it took."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvfabric.attention.merge import Floats


@dataclass(slots=True)
class Traffic:
    """Of one call, with all its queries.

    `sent_bytes` is what has to go out: vectors, and the new tokens' KV (which goes through shared
    memory where there is such); `received_bytes` the outputs with their lse that come back.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    wire_bytes: int = 0  # all that was moved, with whatever else the frames have
    fetched_bytes: int = 0  # of KV beside that, from nodes that compute no attention, in float32
    kernel_s: float = 0.0  # of the node that answered last, of each round
    network_s: float = 0.0  # and what its answer took beyond that: waiting for its turn, too
    kernels: set[str] = field(default_factory=set)  # that computed it
    rounds: int = 0  # more than one: some tokens were not where they were thought to be

    @property
    def header_bytes(self) -> int:
        return self.wire_bytes - self.sent_bytes - self.received_bytes


@dataclass(frozen=True, slots=True)
class Attended:
    """Attention over all tokens that were asked for, each counted once."""

    o: Floats  # [rows, query heads, value dim]
    lse: Floats  # [rows, query heads]
    tokens: dict[str, int]  # by the name of the node that attended them; new ones are in none
    # "": this process did, as their node computes no attention
    traffic: Traffic  # one for all queries of a batch
    approximate: bool = False  # some visible tokens were left out: those of pages not chosen
    share: float = 1.0  # of the visible tokens at nodes, that were attended


@dataclass(frozen=True, slots=True)
class Pages:
    """Sparse attention: of pages of so many tokens, the best `count` by their mean key, for each
    query, are attended; so are the open tokens and the new ones."""

    count: int
    tokens: int  # must divide a full block's


@dataclass(frozen=True, slots=True)
class Best:
    """What a top-k found for one row, the best first."""

    first_tokens: list[int]  # of pages, or the tokens themselves
    scores: list[float]
