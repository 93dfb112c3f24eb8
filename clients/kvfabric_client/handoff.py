"""Hand-off: one engine has prefilled, another decodes, and need not wait for the directory.

What travels between them names a node, how to reach it, and keys that it has.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvfabric.errors import Refused
from kvfabric.rpc.v1 import node_pb2
from kvfabric.settings import host_id
from kvfabric.types import BATCH_KEYS, DIGEST_BYTES, Key, NamespaceId, Status
from kvfabric_client.deadline import Deadline, milliseconds
from kvfabric_client.link import Link

if TYPE_CHECKING:
    from kvfabric_client.client import Client
    from kvfabric_client.room import Room

MAX_HOLDS = 1024
OWN_ADDRESS_S = 60.0  # how long what the manager said of one's own node will do


@dataclass(frozen=True, slots=True)
class HandOff:
    """Keys that a node has, and where that is. An address that is not known is empty."""

    node: str
    host: str
    unix_path: str
    tcp_address: str
    namespace: NamespaceId
    keys: tuple[Key, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; about 70 bytes a key."""
        return {
            "node": self.node,
            "host": self.host,
            "unix_path": self.unix_path,
            "tcp_address": self.tcp_address,
            "namespace": self.namespace.hex(),
            "keys": [key.hex() for key in self.keys],
        }

    @classmethod
    def of(cls, given: Mapping[str, Any], namespace: NamespaceId) -> HandOff:
        """Refused where it is malformed, or not of this namespace."""
        try:
            said = bytes.fromhex(given["namespace"])
            keys = tuple(Key(bytes.fromhex(key)) for key in given["keys"])
            texts = [given[name] for name in ("node", "host", "unix_path", "tcp_address")]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("an address is no text")
            if any(len(key) != DIGEST_BYTES for key in keys):
                raise ValueError("a key is not 32 bytes")
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(
                f"this is no hand-off: {type(error).__name__}: {error}; give what hand_off answered"
            ) from error
        if said != namespace:
            raise Refused(
                f"the hand-off is of namespace {said.hex()[:16]}, this room of "
                f"{namespace.hex()[:16]}: another model, tenant or salt"
            )
        return cls(texts[0], texts[1], texts[2], texts[3], namespace, keys)

    def address(self, client: Client, deadline: Deadline) -> str:
        """How this process reaches the node; empty where it cannot."""
        if self.host == host_id() and self.unix_path and os.path.exists(self.unix_path):
            return f"unix:{self.unix_path}"
        if self.tcp_address:
            return f"tcp:{self.tcp_address}"
        return client.address_of(self.node, deadline)


def hand_off(room: Room, keys: Sequence[Key], hold_s: float, deadline: Deadline) -> HandOff:
    """See `Room.hand_off`."""

    def call(link: Link) -> HandOff:
        link.open(room.namespace, room.id, deadline.at_s)
        held: list[Key] = []
        for start in range(0, len(keys), BATCH_KEYS):
            some = keys[start : start + BATCH_KEYS]
            request = node_pb2.AcquireRequest(
                namespace_id=room.id,
                keys=some,
                lease_ms=milliseconds(hold_s),
                without_checksums=True,
            )
            answer = link.call("acquire", request, deadline.at_s).acquire_response
            if answer.lease:
                room.client.holds.add(link, answer.lease, answer.lease_ms / 1000)
            found = list(answer.statuses)
            count = next((i for i, s in enumerate(found) if s != Status.OK), len(found))
            held += some[:count]
            if count < len(some):
                break
        unix_path, tcp_address = _ways(room.client, link, deadline)
        host = host_id() if unix_path else ""
        return HandOff(link.node, host, unix_path, tcp_address, room.id, tuple(held))

    return room.client.at_home(call, deadline)


def _ways(client: Client, link: Link, deadline: Deadline) -> tuple[str, str]:
    """The node's unix path and TCP address, as far as they are known here."""
    kind, _, rest = link.address.partition(":")
    if kind == "tcp":
        return "", rest
    info = client.fleet.node(link.node, deadline, OWN_ADDRESS_S)
    return rest, info.endpoints.tcp_address if info is not None else ""


class Holds:
    """Leases on what was handed off, until they are over; the oldest go when there are many.

    Thread-safe. What is over is let go of when the next one comes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leases: deque[tuple[float, Link, int]] = deque()

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, link: Link, lease: int, lease_s: float) -> None:
        now_s = time.monotonic()
        with self._lock:
            self._leases.append((now_s + lease_s, link, lease))
            over = [hold for hold in self._leases if hold[0] <= now_s]
            keep = [hold for hold in self._leases if hold[0] > now_s]
            over += keep[:-MAX_HOLDS]
            self._leases = deque(keep[-MAX_HOLDS:])
        for _, held, number in over:
            if held.alive():
                held.release(number)
