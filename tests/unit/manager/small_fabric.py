"""A fabric in memory for tests of moves: the real manager's core, scripted nodes, one seed.

Nodes carry out what their heartbeats' answers bring, after a while that the seed draws;
commands are lost and doubled, nodes are killed, started anew and cut off, and the manager
restarted. A node that is told to drop its copy asks those that are named whether they have
it, and drops what they have: what nobody has is never dropped.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvfabric.directory import Inventory
from kvfabric.manager.core import ManagerCore
from kvfabric.manager.events import Answer, Delta, Heartbeat, Register
from kvfabric.moves.migration import Move, MoveState
from kvfabric.moves.policies import Drain, Policy
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import Key, NamespaceId, NodeId, Tier

SILENCE_S = 5.0
HEARTBEAT_S = 0.5
SHARD_BYTES = 1024 * 1024
ROOM = NamespaceId(b"r" * 32)
OTHER = NamespaceId(b"o" * 32)

Subject = tuple[NamespaceId, Key]


def key(number: int) -> Key:
    return Key(hashlib.sha256(f"{number}".encode()).digest())


def keys(numbers: Iterable[int]) -> list[Key]:
    return [key(number) for number in numbers]


def unpacked(raw: bytes) -> list[Key]:
    return [Key(raw[at : at + 32]) for at in range(0, len(raw), 32)]


@dataclass
class SmallNode:
    """A node's side of the protocol."""

    name: NodeId
    capacity_shards: int
    labels: dict[str, str] = field(default_factory=dict)
    host: str = ""
    incarnation: int = 1
    alive: bool = True
    cut_off: bool = False  # it lives and is not heard
    held: dict[Subject, float] = field(default_factory=dict)  # and when it was used last
    told: set[Subject] = field(default_factory=set)
    pinned: set[Subject] = field(default_factory=set)
    claimed: set[Subject] = field(default_factory=set)
    leased: dict[Subject, float] = field(default_factory=dict)  # until when
    todo: list[tuple[float, float, control_pb2.Command]] = field(default_factory=list)
    draining: bool = False
    sequence: int = 0
    stream: int = 0
    want_full: bool = True
    want_register: bool = True
    next_beat_s: float = 0.0
    heat: dict[Subject, int] = field(default_factory=dict)
    sequences: dict[int, int] = field(default_factory=dict)  # number: bytes at home
    pulled: int = 0  # shards
    pull_rates: list[int] = field(default_factory=list)

    def stats(self) -> types_pb2.NodeStats:
        held_bytes = len(self.held) * SHARD_BYTES
        tier = types_pb2.TierStats(
            tier=types_pb2.TIER_DRAM,
            capacity_bytes=self.capacity_shards * SHARD_BYTES,
            held_bytes=held_bytes,
            free_bytes=self.capacity_shards * SHARD_BYTES - held_bytes,
            shards=len(self.held),
            claimed_bytes=len(self.claimed & self.held.keys()) * SHARD_BYTES,
        )
        return types_pb2.NodeStats(
            node=self.name,
            incarnation=self.incarnation,
            tiers=[tier],
            pins=len(self.pinned & self.held.keys()),
            leases=len(self.leased),
        )

    def make_room(self, subject: Subject, *, evict: bool) -> bool:
        """Whether there is room for one more; colder cache goes for it with `evict`."""
        if len(self.held) < self.capacity_shards:
            return True
        loose = [
            each
            for each in self.held
            if each not in self.pinned and each not in self.claimed and each not in self.leased
        ]
        if not evict or not loose:
            return False
        del self.held[min(loose, key=lambda each: (self.held[each], each))]
        return True


class SmallFabric:
    """See the module. `step` moves the time on by a quarter of a second."""

    def __init__(self, seed: int = 0, *, lost: float = 0.0, doubled: float = 0.0) -> None:
        self.chance = random.Random(seed)
        self.now_s = 100.0
        self.core = ManagerCore(SILENCE_S, 0.0)  # started long ago
        self.nodes: dict[NodeId, SmallNode] = {}
        self.lost_share, self.doubled_share = lost, doubled
        self.delay_s = 0.4  # at most, from a command to its doing
        self.deaths_s: list[float] = [-1.0]
        self.streams = 0
        self.void_drops = 0  # nobody who was named had the shard
        self.given_up: set[Subject] = set()
        self.evicted: set[Subject] = set()
        self.handed: list[control_pb2.Command.HandOver] = []  # what nodes were told
        self.most_in_flight = 0
        self.steps = 0

    # What there is

    def add(self, name: str, capacity_shards: int = 1000, **rest: str) -> SmallNode:
        host = rest.pop("host", name)
        node = SmallNode(NodeId(name), capacity_shards, dict(rest), host, next_beat_s=self.now_s)
        self.nodes[node.name] = node
        return node

    def put(self, name: str, numbers: Iterable[int], room: NamespaceId = ROOM) -> None:
        for number in numbers:
            self.nodes[NodeId(name)].held[room, key(number)] = self.now_s

    def holders(self, number: int, room: NamespaceId = ROOM) -> set[str]:
        subject = (room, key(number))
        return {node.name for node in self.nodes.values() if node.alive and subject in node.held}

    def living(self) -> list[SmallNode]:
        return [node for node in self.nodes.values() if node.alive]

    # What happens

    def kill(self, name: str) -> None:
        node = self.nodes[NodeId(name)]
        node.alive = False
        node.held.clear()
        node.todo.clear()
        self.deaths_s.append(self.now_s)

    def start_anew(self, name: str, survivors: Iterable[Subject] = ()) -> SmallNode:
        old = self.nodes[NodeId(name)]
        node = SmallNode(old.name, old.capacity_shards, old.labels, old.host, old.incarnation + 1)
        node.held = dict.fromkeys(survivors, self.now_s)
        node.next_beat_s = self.now_s
        self.nodes[old.name] = node
        self.deaths_s.append(self.now_s)
        return node

    def restart_manager(self) -> None:
        """Its rules come from the store; all else it learns anew."""
        old = self.core.moving.rules
        self.core = ManagerCore(SILENCE_S, self.now_s)
        rules = self.core.moving.rules
        for namespace, policy in old.policies():
            rules.set_policy(namespace, policy)
        for namespace, pinned, _ in old.pins:
            rules.pins.say(namespace, [pinned], said=True)
        for namespace, counted, replicas in old.counts:
            rules.counts.say(namespace, [counted], replicas)
        rules.drains.update(old.drains)
        for node in self.nodes.values():
            node.want_register = True
            node.want_full = True

    def step(self) -> None:
        self.now_s += 0.25
        for node in self.living():
            for subject in [each for each, end_s in node.leased.items() if end_s <= self.now_s]:
                del node.leased[subject]
            due = [each for each in node.todo if each[0] <= self.now_s]
            node.todo = [each for each in node.todo if each[0] > self.now_s]
            for _, issued_s, command in due:
                self._carry_out(node, command, issued_s)
            if due or node.next_beat_s <= self.now_s:
                node.next_beat_s = self.now_s + HEARTBEAT_S
                if not node.cut_off:
                    self.beat(node)
        self.core.tick(self.now_s)
        self.steps += 1
        if self.steps % 8 == 0:  # it reads every key
            self.core.check()
        self.core.moving.check()
        in_flight = sum(self.core.moving.mover.phases(move)[1] for move in self.moves())
        self.most_in_flight = max(self.most_in_flight, in_flight)

    def run(self, seconds: float) -> None:
        for _ in range(int(seconds * 4)):
            self.step()

    def until_ended(self, move: Move, limit_s: float = 600.0) -> None:
        end_s = self.now_s + limit_s
        while not move.ended:
            assert self.now_s < end_s, f"{move} has not ended"
            self.step()

    def until_quiet(self, limit_s: float = 700.0) -> None:
        """Until no move is under way for a while."""
        end_s, quiet_s = self.now_s + limit_s, self.now_s
        while self.now_s - quiet_s < 20.0:
            self.step()
            if self.moves():
                quiet_s = self.now_s
            assert self.now_s < end_s, f"{self.moves()} do not end"

    def until_empty(self, name: str, limit_s: float = 700.0) -> None:
        """Until the drain of a node says that it may be deleted."""
        end_s = self.now_s + limit_s
        while not self.drained(name).empty:
            self.step()
            assert self.now_s < end_s, f"{name} waits for {self.drained(name).waiting}"

    def drain(self, name: str, bytes_per_s: int = 0) -> None:
        node = NodeId(name)
        incarnation = self.core.cluster.members.known_incarnation(node)
        drain = Drain(incarnation, bytes_per_s)
        self.core.moving.draining.begin(node, drain, self.now_s)

    def drained(self, name: str) -> control_pb2.DrainResponse:
        return self.core.moving.draining.told(NodeId(name), self.now_s)

    def set_policy(
        self, replicas: int, hot_replicas: int = 0, room: NamespaceId | None = ROOM
    ) -> None:
        self.core.moving.rules.set_policy(room, Policy(replicas, hot_replicas))
        self.core.moving.replicas.alarm(self.now_s)

    def set_replicas(self, numbers: Iterable[int], replicas: int) -> None:
        """Counts of their own for single shards; 0: none."""
        self.core.moving.set_replicas(ROOM, keys(numbers), replicas, self.now_s)

    def pin(self, numbers: Iterable[int]) -> None:
        self.core.moving.rules.pins.say(ROOM, keys(numbers), said=True)
        self.core.moving.pinning.pin(ROOM, keys(numbers), self.now_s)

    def unpin(self, numbers: Iterable[int]) -> None:
        self.core.moving.rules.pins.forget(ROOM, keys(numbers))
        self.core.moving.pinning.release(ROOM, keys(numbers), self.now_s)

    def moves(self, kind: str = "") -> list[Move]:
        return [
            move
            for move in self.core.moving.mover.moves()
            if not move.ended and kind in ("", move.kind)
        ]

    # The protocol

    def beat(self, node: SmallNode) -> None:
        if node.want_register:
            endpoints = types_pb2.Endpoints(host=node.host, unix_path=f"/{node.name}")
            event = Register(node.name, node.incarnation, endpoints, node.stats(), node.labels)
            answer = self.core.register(event, self.now_s)
            if answer.known_incarnation:
                node.alive = False  # another start of it is the node now
                return
            self.streams += 1
            node.stream, node.sequence = self.streams, 0
            node.want_register, node.want_full = False, True
            node.todo = [each for each in node.todo if not each[2].HasField("drop")]
        held = set(node.held)
        added = held if node.want_full else held - node.told
        removed = set() if node.want_full else node.told - held
        node.sequence += 1
        told = self.core.heartbeat(
            Heartbeat(
                node.name,
                node.incarnation,
                node.sequence,
                Inventory().plus(b"".join(each for _, each in held)),
                full=node.want_full,
                added=deltas(added),
                removed=deltas(removed),
                stats=node.stats(),
                stream=node.stream,
                heat=self._heat(node),
                sequences=control_pb2.Sequences(
                    sequence=list(node.sequences),
                    namespace_id=[ROOM] * len(node.sequences),
                    tokens=[1] * len(node.sequences),
                    local_bytes=list(node.sequences.values()),
                    remote_bytes=[0] * len(node.sequences),
                    block_bytes=[SHARD_BYTES] * len(node.sequences),
                ),
            ),
            self.now_s,
        )
        node.told, node.want_full = held, False
        self._take(node, told)

    def _take(self, node: SmallNode, told: Answer) -> None:
        node.want_full |= told.want_full or told.want_register
        node.want_register |= told.want_register
        node.draining = told.draining
        for command in told.commands:
            due_s = self.now_s + self.chance.random() * self.delay_s
            for _ in range(2 if self.chance.random() < self.doubled_share else 1):
                if self.chance.random() >= self.lost_share:
                    node.todo.append((due_s, self.now_s, command))
                if not command.HasField("drop"):  # one that waits is for the shard that was there
                    due_s = self.now_s + self.chance.random() * self.delay_s

    def _heat(self, node: SmallNode) -> control_pb2.Heat | None:
        heat, node.heat = node.heat, {}
        if not heat:
            return None
        return control_pb2.Heat(
            namespace_id=[namespace for namespace, _ in heat],
            keys=b"".join(each for _, each in heat),
            reads=list(heat.values()),
        )

    def _carry_out(self, node: SmallNode, command: control_pb2.Command, issued_s: float) -> None:
        what = command.WhichOneof("what")
        if what == "pull":
            self._pull(node, command.pull)
        elif what == "drop":
            self._drop(node, command, issued_s)
        elif what == "hand_over":
            self.handed.append(command.hand_over)
        elif what == "lend_out":
            node.sequences[command.lend_out.sequence] = 0
        elif what == "pin":
            subjects = {
                (NamespaceId(command.pin.namespace_id), k) for k in unpacked(command.pin.keys)
            }
            node.pinned = node.pinned | subjects if command.pin.pinned else node.pinned - subjects

    def _pull(self, node: SmallNode, pull: control_pb2.Command.Pull) -> None:
        node.pull_rates.append(pull.bytes_per_s)
        source = self.nodes[NodeId(pull.source)]
        if node.draining or source.cut_off:
            return
        for each in unpacked(pull.keys):
            subject = (NamespaceId(pull.namespace_id), each)
            if subject in node.held or not source.alive or subject not in source.held:
                continue
            before = set(node.held)
            if node.make_room(subject, evict=pull.evict):
                self.evicted |= before - node.held.keys()
                node.held[subject] = self.now_s
                node.pulled += 1

    def _drop(self, node: SmallNode, command: control_pb2.Command, issued_s: float) -> None:
        later = []
        for each in unpacked(command.drop.keys):
            subject = (NamespaceId(command.drop.namespace_id), each)
            if subject in node.leased:
                later.append(each)
            elif (
                subject in node.held
                and subject not in node.pinned | node.claimed
                and self._may_go(node, subject, command.drop, issued_s)
            ):
                del node.held[subject]
        if later and self.now_s - issued_s < 15.0:
            again = control_pb2.Command()
            again.CopyFrom(command)
            again.drop.keys = b"".join(later)
            node.todo.append((self.now_s + 0.25, issued_s, again))

    def _may_go(
        self,
        node: SmallNode,
        subject: Subject,
        drop: control_pb2.Command.Drop,
        issued_s: float,
    ) -> bool:
        """Whether one of the holders has it, too."""
        if drop.holders:
            named = [self.nodes[NodeId(holder.node)] for holder in drop.holders]
            assert node not in named
            if any(n.alive and not n.cut_off and subject in n.held for n in named):
                return True
            # The manager could not know: somebody has died, was cut off, or has evicted it since.
            excuse = (
                max(self.deaths_s) >= issued_s - SILENCE_S
                or any(n.cut_off for n in named)
                or subject in self.evicted
            )
            assert excuse, f"{node.name} was told to drop the last copy of {subject[1].hex()[:8]}"
            self.void_drops += 1
            return False
        assert drop.cache_only, f"{node.name} was told to drop what nobody is said to have"
        others = [each for each in self.living() if each is not node and subject in each.held]
        if not others:
            self.given_up.add(subject)
        return True


def deltas(subjects: set[Subject]) -> tuple[Delta, ...]:
    rooms = sorted({namespace for namespace, _ in subjects})
    return tuple(
        Delta(room, Tier.DRAM, b"".join(sorted(each for space, each in subjects if space == room)))
        for room in rooms
    )


def succeeded(move: Move) -> bool:
    return move.state is MoveState.DONE and not move.failed
