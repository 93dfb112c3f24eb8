"""What a node has promised to whom, as plain values: the core alone changes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kvfabric.types import BATCH_KEYS, Key, NamespaceId, Status
from kvfabric_nodes.store.extents import Extent
from kvfabric_nodes.store.shards import Shard


@dataclass(slots=True, eq=False)
class Item:
    """One key of a reservation, granted."""

    key: Key
    parent: Key | None
    size_bytes: int
    extent: Extent


@dataclass(slots=True, eq=False)
class Reservation:
    id: int
    session: Session
    namespace: NamespaceId
    layers: int
    ttl_s: float
    deadline_s: float
    items: dict[int, Item]  # by index in the request; settled ones are gone
    filling_since_s: float
    streamed: bool  # the node itself fills it, and gives it back
    tenant: str  # whose memory it takes
    expired: bool = False
    sequence: int = 0  # whose open blocks these are: out of the reach of commit and abort


@dataclass(slots=True, eq=False)
class Lease:
    id: int
    session: Session
    shards: list[Shard]
    deadline_s: float
    granted_s: float
    size_bytes: int
    streamed: bool  # the node itself reads, and gives it back
    expired: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """Extents that the node itself reads for a while, sealed ones and open blocks alike."""

    id: int
    extents: list[Extent]


@dataclass(slots=True, eq=False)
class Session:
    """A client as the core knows it. Everything it holds ends with it."""

    id: int
    tenant: str
    principal: str
    checked: bool = True  # checksums are computed, sent and verified
    shares_memory: bool = True  # its client may map segments
    between_nodes: bool = False  # its client is another node: every namespace is open to it
    namespaces: set[NamespaceId] = field(default_factory=set)
    reservations: dict[int, Reservation] = field(default_factory=dict)
    tails: dict[int, Reservation] = field(default_factory=dict)  # of its sequences
    leases: dict[int, Lease] = field(default_factory=dict)
    mapped: set[int] = field(default_factory=set)  # segments whose descriptor it was given


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to one key of a `reserve`."""

    status: Status
    extent: Extent | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Copied:
    """What a further replica takes over from the one that it was copied from."""

    owner: str
    layers: int  # 0: it was written without checksums
    ttl_s: float  # what is left; 0: until evicted
    why: str = ""  # from where, and what for


@dataclass(frozen=True, slots=True)
class Limits:
    """Every limit of a session's calls, by name."""

    batch_keys: int = BATCH_KEYS
    deadline_s: float = 600.0
    reservations: int = 1024  # per session
    leases: int = 4096  # per session
    namespaces: int = 65536  # whose tenant is remembered
    changes: int = 50_000  # of the inventory, kept for the next heartbeat
    heat: int = 4096  # shards whose reads are told with the next heartbeat, at most


@dataclass(frozen=True, slots=True)
class Books:
    """Bytes of the dram tier."""

    capacity_bytes: int
    held_bytes: int
    reserved_bytes: int
    quarantined_bytes: int
    free_bytes: int
    wasted_bytes: int
    shards: int


@dataclass(slots=True)
class Tally:
    """What the core counts since its start."""

    hits: int = 0
    misses: int = 0
    commits: int = 0
    expired_reservations: int = 0
    expired_leases: int = 0
    dropped_shards: Counter[str] = field(default_factory=Counter)  # by what became of them
    dropped_bytes: Counter[str] = field(default_factory=Counter)
