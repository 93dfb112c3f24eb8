"""What the planner is told and what it answers: columns of instances and sequences, decisions.

A thousand nodes with a hundred thousand sequences are planned for in a second or two, so
they are numpy's arrays, not objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfabric.types import NodeId

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

UNKNOWN = -1  # no host, rack or zone


@dataclass(frozen=True, slots=True)
class Rules:
    """What the planner may do. Shares are of a node's capacity."""

    carry_s: float = 4.0  # how long the moves of one plan may take on a link
    link_share: float = 0.5  # of a link's rate that moves may take
    pressure: float = 0.05  # less room than this is none
    relief: float = 0.15  # the room that a move against pressure makes
    reserve: float = 0.10  # room that a creditor keeps for itself
    min_gain: float = 0.005  # of the debtor's tokens per second; less is not worth a move
    max_decisions: int = 1024
    max_sequences: int = 16  # of one debtor in one plan
    near_creditors: int = 8  # looked at for a sequence; as many again wherever they are
    attend_at_creditor: bool = True  # lent blocks are attended where they lie


@dataclass(frozen=True, slots=True)
class Instances:
    """Columns: element i is one node and the engines that it serves.

    Hosts, racks and zones are numbered; equal numbers are the same, UNKNOWN equals nothing.
    """

    nodes: Sequence[NodeId]
    host: Ints
    rack: Ints
    zone: Ints
    capacity_bytes: Floats
    room_bytes: Floats  # free, and what eviction can free
    lendable_bytes: Floats  # of that, what it may still lend
    borrowed_bytes: Floats
    draining: Flags
    batch: Floats
    waiting: Floats
    tokens: Floats  # attended in a step
    step_s: Floats  # the step model's three parameters
    request_s: Floats
    token_s: Floats


@dataclass(frozen=True, slots=True)
class Contexts:
    """Columns: element i is one open sequence of instance `instance[i]`."""

    instance: Ints
    sequence: NDArray[np.uint64]
    tokens: Floats
    local_bytes: Floats
    remote_bytes: Floats
    block_bytes: Floats


@dataclass(frozen=True, slots=True)
class Decision:
    """Lend so much of a debtor's sequence to a creditor, and why."""

    debtor: NodeId
    creditor: NodeId
    sequence: int
    size_bytes: int
    gain: float  # tokens per second, of both together
    why: str
