"""How fast nodes reach one another, as they measured it while they copied."""

from __future__ import annotations

from collections.abc import Iterable, KeysView

from kvfabric.errors import Broken
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import NodeId

MAX_PEERS = 1024  # remembered per node; what was measured longest ago goes first
_NEW_SHARE = 0.3  # of a new measurement in what is remembered


class Links:
    """Bytes a second between two nodes; smoothed."""

    def __init__(self) -> None:
        self._rates: dict[NodeId, dict[NodeId, float]] = {}  # receiver -> sender -> rate

    def measured(self, node: NodeId, links: Iterable[control_pb2.Link]) -> None:
        """`node` copied from these peers at these rates; a rate of 0 tells nothing."""
        rates = self._rates.setdefault(node, {})
        for link in links:
            peer = NodeId(link.peer)
            if not link.bytes_per_s:
                continue
            old = rates.pop(peer, float(link.bytes_per_s))
            rates[peer] = old + _NEW_SHARE * (link.bytes_per_s - old)
            if len(rates) > MAX_PEERS:
                del rates[next(iter(rates))]

    def forget(self, node: NodeId) -> None:
        """What the node measured; it may come back at another place."""
        self._rates.pop(node, None)

    def rate(self, sender: NodeId, receiver: NodeId) -> float:
        """Of this direction, else of the other; 0: never measured."""
        found = self._rates.get(receiver, {}).get(sender)
        return found or self._rates.get(sender, {}).get(receiver, 0.0)

    def peers(self, node: NodeId) -> KeysView[NodeId]:
        """Nodes from which it copied lately."""
        return self._rates.get(node, {}).keys()

    def known(self) -> Iterable[tuple[NodeId, NodeId, float]]:
        """(sender, receiver, rate) of every direction that was measured."""
        for receiver, rates in self._rates.items():
            for sender, rate in rates.items():
                yield sender, receiver, rate

    def check(self) -> None:
        """Broken unless every node remembers a limited number."""
        for node, rates in self._rates.items():
            if len(rates) > MAX_PEERS:
                raise Broken(f"{len(rates)} links of {node} are over {MAX_PEERS}: a bug")
