"""What goes into the manager's core, and what comes out."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvfabric.directory import Inventory, Place
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import NamespaceId, NodeId, Tier


@dataclass(frozen=True, slots=True)
class Register:
    """A node's first word."""

    node: NodeId
    incarnation: int
    endpoints: types_pb2.Endpoints = field(default_factory=types_pb2.Endpoints)
    stats: types_pb2.NodeStats = field(default_factory=types_pb2.NodeStats)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Registered:
    """Accepted if `known_incarnation` is 0, else fenced: that incarnation is known."""

    known_incarnation: int


@dataclass(frozen=True, slots=True)
class Delta:
    """Keys (32 bytes each) of one namespace and tier."""

    namespace: NamespaceId
    tier: Tier
    keys: bytes


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """See HeartbeatRequest in control.proto. `inventory` is that after this message.

    `stream` numbers the streams that a node opened, in their order. The protos belong to
    the message: who keeps something of them copies it.
    """

    node: NodeId
    incarnation: int
    sequence: int
    inventory: Inventory
    full: bool = False
    more: bool = False
    added: tuple[Delta, ...] = ()
    removed: tuple[Delta, ...] = ()
    stats: types_pb2.NodeStats | None = None
    stream: int = 0
    loans: control_pb2.Loans | None = None
    sequences: control_pb2.Sequences | None = None
    heat: control_pb2.Heat | None = None
    steps: control_pb2.StepSums | None = None
    links: tuple[control_pb2.Link, ...] = ()
    heads: tuple[control_pb2.Heads, ...] = ()


class Outcome(enum.Enum):
    """What became of a heartbeat."""

    APPLIED = "applied"  # the books agree with it, or it is part of a larger message
    DISTRUSTED = "distrusted"  # they do not, or it is void until a full report has come
    DUPLICATE = "duplicate"
    STRANGER = "stranger"


class Cause(enum.Enum):
    """Why a full report is wanted."""

    GAP = "gap"  # heartbeats before this one never came
    DRIFT = "drift"  # count or hash differ after a delta
    MISMATCH = "mismatch"  # count or hash differ after a full report
    BROKEN_OFF = "broken_off"  # a full report was begun and not ended
    RETURNED = "returned"  # the node had been lost


@dataclass(frozen=True, slots=True)
class Answer:
    """To one heartbeat. `cause` is set when this very heartbeat made a full report necessary."""

    sequence: int
    outcome: Outcome
    want_full: bool = False
    want_register: bool = False
    cause: Cause | None = None
    commands: tuple[control_pb2.Command, ...] = ()
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Lost:
    """A node fell silent; so many replicas are no longer believed in."""

    node: NodeId
    incarnation: int
    replicas: int


@dataclass(frozen=True, slots=True)
class Explained:
    """One remembered event."""

    age_s: float
    node: NodeId
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Events, oldest first, and of each key with the asked first bytes where it lies now."""

    events: tuple[Explained, ...]
    places: tuple[Place, ...]
    replicas: tuple[int, ...]  # that rules want of it
