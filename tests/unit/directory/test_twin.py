"""The directory gives the answers of a naive set of replicas, whatever happens to it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvfabric.directory import Directory, Inventory, Replica
from kvfabric.types import Key, NamespaceId, NodeId, Tier

ROOMS = [NamespaceId(bytes([number]) * 32) for number in range(2)]
KEYS = [Key(bytes([number]) * 32) for number in range(5)]

nodes = st.sampled_from([NodeId("a"), NodeId("b"), NodeId("c")])
rooms = st.sampled_from(ROOMS)
tiers = st.sampled_from([Tier.DRAM, Tier.FILE])
key_lists = st.lists(st.sampled_from(KEYS), max_size=4)

Held = set[tuple[NodeId, NamespaceId, Tier, Key]]


class Twins(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Directory()
        self.held: Held = set()
        self.drafts: Held = set()

    @rule(node=nodes, room=rooms, tier=tiers, keys=key_lists, draft=st.booleans())
    def add(
        self, node: NodeId, room: NamespaceId, tier: Tier, keys: list[Key], draft: bool
    ) -> None:
        twin = self.drafts if draft else self.held
        new = {(node, room, tier, key) for key in keys} - twin
        assert self.directory.add(node, room, tier, b"".join(keys), draft=draft) == len(new)
        twin |= new

    @rule(node=nodes, room=rooms, tier=tiers, keys=key_lists, draft=st.booleans())
    def remove(
        self, node: NodeId, room: NamespaceId, tier: Tier, keys: list[Key], draft: bool
    ) -> None:
        twin = self.drafts if draft else self.held
        old = {(node, room, tier, key) for key in keys} & twin
        assert self.directory.remove(node, room, tier, b"".join(keys), draft=draft) == len(old)
        twin -= old

    @rule(node=nodes)
    def publish(self, node: NodeId) -> None:
        self.directory.publish(node)
        mine = {each for each in self.drafts if each[0] == node}
        self.held = {each for each in self.held if each[0] != node} | mine
        self.drafts -= mine

    @rule(node=nodes)
    def discard_draft(self, node: NodeId) -> None:
        self.directory.discard_draft(node)
        self.drafts = {each for each in self.drafts if each[0] != node}

    @rule(node=nodes)
    def drop(self, node: NodeId) -> None:
        gone = {each for each in self.held if each[0] == node}
        assert self.directory.drop(node) == len(gone)
        self.held -= gone
        self.drafts = {each for each in self.drafts if each[0] != node}

    @rule(limit=st.integers(1, 3))
    def sweep(self, limit: int) -> None:
        self.directory.sweep(limit)

    @rule(room=rooms, keys=key_lists)
    def prefix(self, room: NamespaceId, keys: list[Key]) -> None:
        located = self.directory.locate(room, keys, prefix=True)
        homes = [self.replicas(room, key) for key in keys]
        reach = homes.index([]) if [] in homes else len(homes)
        assert [list(located.places[index]) for index in located.indices] == homes[:reach]

    @rule(
        node=nodes,
        room=st.none() | rooms,
        limits=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    )
    def walk(self, node: NodeId, room: NamespaceId | None, limits: list[int]) -> None:
        """A walk that nobody disturbs finds each key once, whatever its slices."""
        found: list[tuple[NamespaceId, Key]] = []
        cursor, more, number = None, True, 0
        while more:
            lots, cursor = self.directory.pick(
                lambda place: any(replica.node == node for replica in place),
                cursor,
                limits[number % len(limits)],
                namespace=room,
            )
            assert sum(len(lot.keys) for lot in lots) <= limits[number % len(limits)]
            for lot in lots:
                assert all(list(lot.place) == self.replicas(lot.namespace, key) for key in lot.keys)
                found += [(lot.namespace, key) for key in lot.keys]
            number += 1
            more = cursor is not None
        assert sorted(found) == sorted(
            {(space, key) for owner, space, _, key in self.held if owner == node}
            if room is None
            else {
                (room, key) for owner, space, _, key in self.held if (owner, space) == (node, room)
            }
        )

    @rule(node=nodes)
    def count(self, node: NodeId) -> None:
        mine = {(room, key) for owner, room, _, key in self.held if owner == node}
        assert len(mine) == self.directory.count(
            lambda place: any(replica.node == node for replica in place)
        )

    @invariant()
    def same_answers(self) -> None:
        self.directory.check()
        for room in ROOMS:
            located = self.directory.locate(room, KEYS, prefix=False)
            homes = [*located.places, ()]
            for key, index in zip(KEYS, located.indices, strict=True):
                assert list(homes[index]) == self.replicas(room, key)
        assert self.directory.replicas == len(self.held)
        assert self.directory.keys == len({(room, key) for _, room, _, key in self.held})
        for node in ("a", "b", "c"):
            mine = [key for owner, _, _, key in self.held if owner == node]
            assert self.directory.inventory(NodeId(node)) == Inventory().plus(b"".join(mine))

    def replicas(self, room: NamespaceId, key: Key) -> list[Replica]:
        found = [
            Replica(node, tier)
            for node, namespace, tier, each in self.held
            if (namespace, each) == (room, key)
        ]
        return sorted(found, key=lambda replica: (replica.tier, replica.node))


Twins.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestTwins = Twins.TestCase
