"""Looks over a simulated cluster while it runs: books, bytes, holes, and what is left over."""

from __future__ import annotations

from dataclasses import dataclass

from kvfabric.simulation.faults import Cluster
from kvfabric.simulation.nodes import MANAGER, Node, Written
from kvfabric.simulation.world import World
from kvfabric.types import Key, NamespaceId, NodeId

SETTLE_S = 3.0  # after a fault or a lost message: heartbeats have told by then who holds what


class Violation(Exception):
    """An invariant does not hold. Its text says which, where and when."""


def place_of(error: BaseException) -> str:
    """What went wrong, and the line that found it."""
    found = error.__traceback__
    while found is not None and found.tb_next is not None:
        found = found.tb_next
    text = f"{type(error).__name__} {error}".strip()
    if found is None:
        return text
    code = found.tb_frame.f_code
    name = "/".join(code.co_filename.split("/")[-2:])
    return f"{text} ({name}:{found.tb_lineno}, {code.co_name})"


@dataclass(slots=True)
class Reads:
    """What readers got."""

    home: int = 0
    lent: int = 0
    found: int = 0  # where the manager said
    missed: int = 0


class Auditor:
    """See the module."""

    def __init__(self, world: World, cluster: Cluster) -> None:
        self.reads = Reads()
        self._world = world
        self._cluster = cluster

    def books(self) -> None:
        """Every core's own invariants."""
        try:
            self._world.check()
        except Exception as error:
            raise Violation(f"a book is wrong: {place_of(error)}") from error

    def read(self, home: Node, written: Written) -> None:
        """As a reader would, by its home node: there, where it was lent, where the manager
        knows it. The right bytes or a miss; and no miss while a replica is known."""
        namespace, key = written.namespace, written.key
        payload = home.payload(namespace, key)
        where = home.name
        if payload is None:
            where, payload = self._elsewhere(home, namespace, key)
        elif payload == written.payload:
            self.reads.home += 1
        if payload is None:
            self._explain_miss(home, namespace, key)
        elif payload != written.payload:
            raise Violation(
                f"wrong bytes: {key.hex()[:12]} read at {where} for {home.name} is "
                f"{payload.hex()[:24]}"
            )

    def quiet(self) -> list[str]:
        """What is wrong once every fault is over and every deadline has passed: books that
        differ between debtor, creditor and manager. Empty: nothing."""
        world = self._world
        lent = {name: node.lent_bytes() for name, node in world.nodes.items()}
        borrowed = {name: node.borrowed_bytes() for name, node in world.nodes.items()}
        found: list[str] = []
        if sum(lent.values()) != sum(borrowed.values()):
            found.append(f"lent {lent}, borrowed {borrowed}")
        assert world.manager is not None
        core = world.manager.core
        found += [f"the ledger: {each}" for each in core.cluster.ledger.differences()]
        for name, node in world.nodes.items():
            told = core.cluster.directory.inventory(NodeId(name))
            if told != node.inventory():
                found.append(f"the directory has {told} of {name}, it holds {node.inventory()}")
        return found

    def leftovers(self) -> list[str]:
        """What nobody needs and is still there, once everything was closed."""
        return [each for node in self._world.nodes.values() for each in node.leftovers()]

    # Inside

    def _elsewhere(self, home: Node, namespace: NamespaceId, key: Key) -> tuple[str, bytes | None]:
        lender = home.whereabouts(namespace, key)
        payload = self._at(home, lender, namespace, key) if lender else None
        if payload is not None:
            self.reads.lent += 1
            return str(lender), payload
        for name in self._known(home, namespace, key):
            payload = self._at(home, name, namespace, key)
            if payload is not None:
                self.reads.found += 1
                return name, payload
        self.reads.missed += 1
        return "", None

    def _known(self, home: Node, namespace: NamespaceId, key: Key) -> list[str]:
        manager = self._world.manager
        if manager is None or not self._world.network.reachable(home.name, MANAGER):
            return []
        located = manager.core.locate(namespace, [key], prefix=False)
        places = located.places
        return [
            each.node for index in located.indices if index < len(places) for each in places[index]
        ]

    def _at(self, home: Node, name: str, namespace: NamespaceId, key: Key) -> bytes | None:
        node = self._world.nodes.get(name)
        if node is None or not self._world.network.reachable(home.name, name):
            return None
        return node.payload(namespace, key)

    def _explain_miss(self, home: Node, namespace: NamespaceId, key: Key) -> None:
        """A miss is right where nothing is left, nothing can be reached, or nobody can know."""
        world = self._world
        if not self._cluster.lossy:
            raise Violation(
                f"{key.hex()[:12]} of an open sequence at {home.name} is lost, and nothing "
                "happened that may lose a shard"
            )
        reachable = world.network.reachable
        if world.simulation.now_s - self._cluster.troubled_s < SETTLE_S:
            return
        if not reachable(home.name, MANAGER):
            return  # nobody tells it where else to look
        for name, node in world.nodes.items():
            told = self._told(name) and reachable(home.name, name)
            if told and node.holds(namespace, key):
                raise Violation(
                    f"a hole: {key.hex()[:12]} is missed at {home.name}, and {name} has it"
                )

    def _told(self, name: str) -> bool:
        """Whether the manager must know by now what this node holds: heartbeats got through."""
        network = self._world.network
        settled = network.since_lost_s(name, MANAGER) >= SETTLE_S
        return settled and network.reachable(name, MANAGER)
