"""Whatever happens to messages, nodes and the manager: two clean heartbeats mend everything.

Scripted nodes commit and evict; their messages are delivered, lost, doubled, or kept
back and delivered late; nodes reconnect, restart and fall silent; the manager
restarts. Its books are checked after every step.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvfabric.directory import Inventory, Replica
from kvfabric.manager.core import ManagerCore
from kvfabric.manager.events import Answer, Delta, Heartbeat, Register
from kvfabric.types import Key, NamespaceId, NodeId, Tier

SILENCE_S = 5.0
ROOM = NamespaceId(b"r" * 32)
KEYS = [Key(bytes([number]) * 32) for number in range(6)]
NODES = [NodeId("n0"), NodeId("n1")]

Held = set[tuple[Tier, Key]]


@dataclass
class ScriptedNode:
    """A node's side of the protocol, as control.proto says it."""

    name: NodeId
    incarnation: int = 1
    stream: int = 0
    sequence: int = 0
    held: Held = field(default_factory=set)
    told: Held = field(default_factory=set)  # held when the last message was made
    want_full: bool = True
    want_register: bool = True

    def messages(self, pieces: int) -> list[Heartbeat]:
        """The next heartbeat; a full report is cut into `pieces`."""
        if self.want_full:
            everything = sorted(self.held)
            parts = [set(everything[part::pieces]) for part in range(pieces)]
            out = [
                self._message(part, set(), full=True, more=number < pieces)
                for number, part in enumerate(parts, start=1)
            ]
        else:
            out = [self._message(self.held - self.told, self.told - self.held)]
        self.told = set(self.held)
        self.want_full = False
        return out

    def take(self, answer: Answer) -> None:
        # Who is to register tells everything anew: the manager may know nothing.
        self.want_full |= answer.want_full or answer.want_register
        self.want_register |= answer.want_register

    def _message(
        self, added: Held, removed: Held, *, full: bool = False, more: bool = False
    ) -> Heartbeat:
        self.sequence += 1
        return Heartbeat(
            self.name,
            self.incarnation,
            self.sequence,
            Inventory() if more else Inventory().plus(b"".join(key for _, key in self.held)),
            full,
            more,
            deltas(added),
            deltas(removed),
            stream=self.stream,
        )


def deltas(held: Held) -> tuple[Delta, ...]:
    return tuple(
        Delta(ROOM, tier, b"".join(sorted(key for each, key in held if each is tier)))
        for tier in sorted({tier for tier, _ in held})
    )


class Convergence(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.core = ManagerCore(SILENCE_S, self.now_s)
        self.nodes = {name: ScriptedNode(name) for name in NODES}
        self.streams = itertools.count(1)
        self.kept: list[Heartbeat] = []

    # What nodes do

    @rule(
        name=st.sampled_from(NODES),
        tier=st.sampled_from([Tier.DRAM, Tier.FILE]),
        keys=st.sets(st.sampled_from(KEYS)),
        evict=st.booleans(),
    )
    def work(self, name: NodeId, tier: Tier, keys: set[Key], evict: bool) -> None:
        changed = {(tier, key) for key in keys}
        node = self.nodes[name]
        node.held = node.held - changed if evict else node.held | changed

    @rule(name=st.sampled_from(NODES))
    def swap_tiers(self, name: NodeId) -> None:
        """What neither count nor hash can tell."""
        node = self.nodes[name]
        other = {Tier.DRAM: Tier.FILE, Tier.FILE: Tier.DRAM}
        node.held = {(other[tier], key) for tier, key in node.held}

    @rule(
        name=st.sampled_from(NODES),
        pieces=st.integers(1, 3),
        fates=st.lists(st.sampled_from(["come", "lost", "twice", "late"]), min_size=3, max_size=3),
    )
    def heartbeat(self, name: NodeId, pieces: int, fates: list[str]) -> None:
        node = self.nodes[name]
        self.register(node)
        for message, fate in zip(node.messages(pieces), fates, strict=False):
            if fate == "late":
                self.kept.append(message)
            if fate in ("come", "twice"):
                node.take(self.core.heartbeat(message, self.now_s))
            if fate == "twice":
                again = self.core.heartbeat(message, self.now_s)
                assert again.outcome.value in ("duplicate", "stranger")

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def late_arrival(self, data: st.DataObject) -> None:
        message = self.kept.pop(data.draw(st.integers(0, len(self.kept) - 1)))
        self.core.heartbeat(message, self.now_s)  # its sender no longer waits for the answer

    @rule(name=st.sampled_from(NODES), anew=st.booleans())
    def reconnect(self, name: NodeId, anew: bool) -> None:
        """On a new stream; heartbeats are numbered anew, in full, or go on."""
        node = self.nodes[name]
        node.want_register = True
        if anew:
            node.sequence = 0
            node.want_full = True

    @rule(name=st.sampled_from(NODES), survivors=st.sets(st.sampled_from(KEYS)))
    def restart(self, name: NodeId, survivors: set[Key]) -> None:
        old = self.nodes[name]
        held = {(tier, key) for tier, key in old.held if key in survivors}
        self.nodes[name] = ScriptedNode(name, old.incarnation + 1, held=held)

    # What happens to the manager

    @rule(seconds=st.sampled_from([0.5, 2.0, 4.0]))
    def time_passes(self, seconds: float) -> None:
        for _ in range(int(seconds / 0.5)):
            self.now_s += 0.5
            self.core.tick(self.now_s)

    @rule()
    def manager_was_stopped(self) -> None:
        self.now_s += 100.0
        assert self.core.tick(self.now_s) == []

    @rule()
    def manager_restarts(self) -> None:
        self.core = ManagerCore(SILENCE_S, self.now_s)
        self.kept.clear()  # connections die with it

    # What must hold

    @rule(pieces=st.integers(1, 3))
    def two_clean_heartbeats_mend_everything(self, pieces: int) -> None:
        for _ in range(2):
            for node in self.nodes.values():
                self.register(node)
                for message in node.messages(pieces):
                    node.take(self.core.heartbeat(message, self.now_s))

        self.core.check()
        located = self.core.locate(ROOM, KEYS, prefix=False)
        places = [*located.places, ()]
        found = {key: places[index] for key, index in zip(KEYS, located.indices, strict=True)}
        assert found == {key: self.homes(key) for key in KEYS}
        assert {member.state.value for member in self.core.members()} == {"live"}

    @invariant()
    def books_agree(self) -> None:
        self.core.check()

    def register(self, node: ScriptedNode) -> None:
        """As a node does it, and opens a new stream."""
        if not node.want_register:
            return
        known = self.core.register(Register(node.name, node.incarnation), self.now_s)
        assert known.known_incarnation == 0
        node.want_register = False
        node.stream = next(self.streams)

    def homes(self, key: Key) -> tuple[Replica, ...]:
        found = [
            Replica(node.name, tier)
            for node in self.nodes.values()
            for tier, each in node.held
            if each == key
        ]
        return tuple(sorted(found, key=lambda replica: (replica.tier, replica.node)))


Convergence.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestConvergence = Convergence.TestCase
