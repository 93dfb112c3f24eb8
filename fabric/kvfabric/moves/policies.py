"""The rules that operators set: replica counts, pins, and nodes to be emptied.

They are durable, and everything else follows them. This is what they are and how they are
written in the MetadataStore; the store itself is read and written by the manager's shell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from kvfabric.errors import Broken, Refused
from kvfabric.moves.keyed import Keyed
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import DIGEST_BYTES, Key, NamespaceId, NodeId

POLICY_PREFIX, COUNT_PREFIX = "policy/", "replicas/"
PIN_PREFIX, DRAIN_PREFIX = "pin/", "drain/"
PREFIXES = (POLICY_PREFIX, COUNT_PREFIX, PIN_PREFIX, DRAIN_PREFIX)
DEFAULT = "default"  # in the place of a namespace
MAX_POLICIES = 1024
MAX_PINS = 65_536
MAX_COUNTS = 32_768  # as many are listed by one message
MAX_REPLICAS = 16


@dataclass(frozen=True, slots=True)
class Policy:
    """How many replicas a namespace's shards should have."""

    replicas: int = 0  # 0: as the default says; there, 1
    hot_replicas: int = 0  # extra ones at most, of shards that are read much; 0: none


@dataclass(frozen=True, slots=True)
class Drain:
    """A node is to be emptied."""

    incarnation: int  # the one that was there when it was asked for
    bytes_per_s: int = 0  # 0: unthrottled


class Rules:
    """All rules, in memory. The calls that change one are safe to repeat."""

    def __init__(self) -> None:
        self._policies: dict[NamespaceId | None, Policy] = {}
        self.counts: Keyed[int] = Keyed(MAX_COUNTS, "have counts of their own", "take some back")
        self.pins: Keyed[bool] = Keyed(MAX_PINS, "are pinned", "unpin some first")
        self.drains: dict[NodeId, Drain] = {}

    def replicas(self, namespace: NamespaceId, key: Key | None = None) -> int:
        """How many a shard should have, at least 1; None: one without a count of its own."""
        if key is not None and (count := self.counts.get(namespace, key)):
            return count
        own = self._policies.get(namespace)
        if own and own.replicas:
            return own.replicas
        default = self._policies.get(None)
        return max(1, default.replicas if default else 1)

    def by_replicas(self, namespace: NamespaceId, keys: list[Key]) -> dict[int, list[Key]]:
        """The keys, by how many replicas they should have."""
        if not self.counts.any_in(namespace):
            return {self.replicas(namespace): keys}
        found: dict[int, list[Key]] = {}
        for key in keys:
            found.setdefault(self.replicas(namespace, key), []).append(key)
        return found

    def hot_replicas(self, namespace: NamespaceId) -> int:
        """How many more it may have while it is read much. A namespace's own policy rules."""
        policy = self._policies.get(namespace) or self._policies.get(None)
        return policy.hot_replicas if policy else 0

    @property
    def spreads(self) -> bool:
        """Whether any shards get extra replicas while they are read much."""
        return any(policy.hot_replicas for policy in self._policies.values())

    def counted(self) -> list[NamespaceId | None]:
        """Namespaces whose policy wants more than one replica; None: all without one of theirs."""
        found = [each for each, policy in self._policies.items() if policy.replicas > 1]
        return sorted(found, key=lambda each: each or b"")

    def set_policy(self, namespace: NamespaceId | None, policy: Policy) -> None:
        """Refused for numbers that cannot be, or too many policies."""
        check_policy(policy)
        if namespace not in self._policies and len(self._policies) >= MAX_POLICIES:
            raise Refused(f"{MAX_POLICIES} policies are set already; remove one first")
        self._policies[namespace] = policy

    def remove_policy(self, namespace: NamespaceId | None) -> None:
        self._policies.pop(namespace, None)

    def policies(self) -> Iterator[tuple[NamespaceId | None, Policy]]:
        """Every policy, the default first."""
        yield from sorted(self._policies.items(), key=lambda item: item[0] or b"")

    def pinned(self, namespace: NamespaceId, key: Key) -> bool:
        return (namespace, key) in self.pins

    def check(self) -> None:
        """Broken unless counts and limits are right."""
        self.counts.check()
        self.pins.check()


def check_policy(policy: Policy) -> None:
    """Refused unless its numbers can be."""
    if not 0 <= policy.replicas <= MAX_REPLICAS or not 0 <= policy.hot_replicas <= MAX_REPLICAS:
        raise Refused(
            f"{policy.replicas} replicas and {policy.hot_replicas} hot ones cannot be kept; "
            f"take at most {MAX_REPLICAS} of each"
        )


def check_count(replicas: int) -> None:
    """Refused unless a shard may have so many."""
    if not 1 <= replicas <= MAX_REPLICAS:
        raise Refused(f"a shard has 1 to {MAX_REPLICAS} replicas, not {replicas}")


# As entries of the store


def policy_entry(namespace: NamespaceId | None, policy: Policy) -> tuple[str, bytes]:
    told = control_pb2.Policy(replicas=policy.replicas, hot_replicas=policy.hot_replicas)
    return policy_key(namespace), told.SerializeToString(deterministic=True)


def policy_key(namespace: NamespaceId | None) -> str:
    return POLICY_PREFIX + (namespace.hex() if namespace else DEFAULT)


def count_entry(namespace: NamespaceId, key: Key, replicas: int) -> tuple[str, bytes]:
    return count_key(namespace, key), str(replicas).encode()


def count_key(namespace: NamespaceId, key: Key) -> str:
    return f"{COUNT_PREFIX}{namespace.hex()}/{key.hex()}"


def pin_key(namespace: NamespaceId, key: Key) -> str:
    return f"{PIN_PREFIX}{namespace.hex()}/{key.hex()}"


def drain_entry(node: NodeId, drain: Drain) -> tuple[str, bytes]:
    return drain_key(node), f"{drain.incarnation} {drain.bytes_per_s}".encode()


def drain_key(node: NodeId) -> str:
    return DRAIN_PREFIX + node


def load(rules: Rules, key: str, value: bytes) -> None:
    """Takes one entry of the store in. Broken for one that cannot be."""
    try:
        if key.startswith(POLICY_PREFIX):
            name = key.removeprefix(POLICY_PREFIX)
            told = control_pb2.Policy.FromString(value)
            room = None if name == DEFAULT else NamespaceId(_digest(name))
            rules.set_policy(room, Policy(told.replicas, told.hot_replicas))
        elif key.startswith(PIN_PREFIX):
            namespace, shard = _subject(key.removeprefix(PIN_PREFIX))
            rules.pins.say(namespace, [shard], said=True)
        elif key.startswith(COUNT_PREFIX):
            namespace, shard = _subject(key.removeprefix(COUNT_PREFIX))
            replicas = int(value)
            check_count(replicas)
            rules.counts.say(namespace, [shard], replicas)
        elif key.startswith(DRAIN_PREFIX):
            incarnation, bytes_per_s = (int(number) for number in value.split())
            rules.drains[NodeId(key.removeprefix(DRAIN_PREFIX))] = Drain(incarnation, bytes_per_s)
    except (ValueError, DecodeError, Refused) as error:
        raise Broken(
            f"the store's {key!r} is {value[:40]!r}, which is no rule ({error}); delete "
            "it, or restore the store"
        ) from error


def _subject(text: str) -> tuple[NamespaceId, Key]:
    room, _, name = text.partition("/")
    return NamespaceId(_digest(room)), Key(_digest(name))


def _digest(text: str) -> bytes:
    raw = bytes.fromhex(text)
    if len(raw) != DIGEST_BYTES:
        raise ValueError(f"{text[:80]!r} is not {DIGEST_BYTES} bytes in hex")
    return raw
