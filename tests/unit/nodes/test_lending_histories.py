"""Loans in random histories: whatever the network, the clients and death do, nothing wrong is
read, the books stay right, nothing leaks, and what had a good copy is not lost for a loan."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import Key
from kvfabric_nodes.lending.post import CALL_S
from kvfabric_nodes.lending.room import RoomState

from .conftest import SHARD_BYTES, key
from .lenders import SLOTS, Node, Town, Weather

STEPS = 120
LOSSES = {"lost", "damaged", "purged", "not claimed"}
LOAN_S = 12.0
RECALL_S = 6.0


class History:
    """Random things that happen in a town. `rough`: also those that may lose blocks."""

    def __init__(self, seed: int, *, rough: bool) -> None:
        self.random = Random(seed)
        weather = Weather(
            loss=self.random.choice([0.0, 0.05, 0.3] if rough else [0.0, 0.05]),
            twice=self.random.choice([0.0, 0.2]),
            delay_s=self.random.choice([0.01, 0.5]),
            pull_s=self.random.choice([0.01, 1.0]),
            call_s=2.0 if rough else 1.2,
        )
        self.town = Town(
            ["a", "b", "c", "d"][: self.random.choice([2, 3, 4])],
            seed,
            weather,
            cap_bytes=self.random.choice([4, SLOTS // 2, SLOTS]) * SHARD_BYTES,
            loan_s=LOAN_S if rough else 60.0,
            recall_s=RECALL_S if rough else 900.0,
            lend_while_owing=self.random.random() < 0.3,
        )
        self.rough = rough
        self.count = 0

    def live(self) -> None:
        deeds: list[tuple[int, Callable[[Node], None]]] = [
            (20, self.grow),
            (2, self.share),
            (4, self.forget),
            (2, self.cache),
            (2, self.begin),
            (3, self.lease),
            (4, self.release),
            (2, self.lend_out),
            (2, self.bring_home),
            (1, self.recall),
            (1, self.drain),
        ]
        if self.rough:
            deeds += [
                (1, self.restart),
                (2, self.cut),
                (2, self.silence),
                (1, self.damage),
                (3, self.replicate),
                (1, self.lose),
            ]
        weights = [weight for weight, _ in deeds]
        for _ in range(STEPS):
            deed = self.random.choices(deeds, weights)[0][1]
            deed(self.any_node())
            for node in self.town.everybody():
                node.carry_out()
            self.town.run(self.random.choice([0.0, 0.01, 0.1, 0.5, 2.0]))
            self.town.check()
            if not self.rough:
                assert not self.town.missing()

    def calm_down(self) -> None:
        """The weather is fine again, and everything that waits has its time."""
        town = self.town
        town.weather.loss = town.weather.twice = 0.0
        town.weather.cut.clear()
        town.weather.manager = True
        for node in town.everybody():
            node.core.draining = False
            self.release(node, all_of_them=True)
            for room in node.rooms:
                node.lending.cancel(room)
        town.run(3 * LOAN_S + 130 + 60 + CALL_S if self.rough else 300.0)
        town.check()

    # Deeds ----------------------------------------------------------------------------

    def any_node(self) -> Node:
        return self.random.choice(list(self.town.everybody()))

    def any_of(self, node: Node) -> Key | None:
        return self.random.choice(list(node.needed)) if node.needed else None

    def grow(self, node: Node) -> None:
        for _ in range(self.random.choice([1, 1, 4])):
            self.count += 1
            if not node.put(key(self.count)) and sum(r.waiting for r in node.rooms) < 3:
                node.make_room(self.random.choice([1, 3]))

    def share(self, node: Node) -> None:
        """A block that another node needs, too."""
        shared = self.any_of(self.any_node())
        if shared is not None:
            node.put(shared)

    def cache(self, node: Node) -> None:
        self.count += 1
        node.put(key(self.count), need=False)

    def forget(self, node: Node) -> None:
        for _ in range(self.random.choice([1, 5])):
            old = self.any_of(node)
            if old is not None:
                node.forget(old, drop=self.random.random() < 0.5)

    def begin(self, node: Node) -> None:
        """A sequence begins with what another node has: it may stay there, or vanish."""
        other = self.any_node()
        there = [shard.key for shard in other.core.shards][: self.random.choice([1, 4])]
        found = [each for each in there if each not in node.needed]
        node.hoped.update(found)
        node.begin(found)

    def replicate(self, node: Node) -> None:
        """A replica of what another node needs, as the manager's policy makes them."""
        for each in list(self.any_node().needed)[:4]:
            node.put(each, need=False)

    def lease(self, node: Node) -> None:
        wanted = self.any_of(node)
        if wanted is not None and node.shard(wanted):
            node.desk.now_s = self.town.now_s
            node.leases.append(node.desk.lease([wanted], 30.0))

    def release(self, node: Node, all_of_them: bool = False) -> None:
        count = len(node.leases) if all_of_them else self.random.randint(0, len(node.leases))
        node.core.release(node.desk.session, node.leases[:count])
        del node.leases[:count]

    def lend_out(self, node: Node) -> None:
        to = self.any_node().name
        what = control_pb2.Command.LendOut(
            sequence=self.count,
            size_bytes=self.random.choice([1, 4]) * SHARD_BYTES,
            creditor=to,
            endpoints=types_pb2.Endpoints(host=to),
        )
        self.command(node, control_pb2.Command(id=self.count, lend_out=what))

    def bring_home(self, node: Node) -> None:
        for loan in node.borrowed():
            home = control_pb2.Command.BringHome(
                loan=loan.loan, size_bytes=self.random.choice([0, SHARD_BYTES])
            )
            self.command(node, control_pb2.Command(id=self.count, bring_home=home))

    def recall(self, node: Node) -> None:
        debtor = self.any_node().name
        recall = control_pb2.Command.Recall(
            debtor=debtor,
            endpoints=types_pb2.Endpoints(host=debtor),
            size_bytes=self.random.choice([0, 2 * SHARD_BYTES]),
            deadline_ms=0 if self.rough else 900_000,
        )
        self.command(node, control_pb2.Command(id=self.count, recall=recall))

    def command(self, node: Node, command: control_pb2.Command) -> None:
        node.lending.command(command, 1, self.town.now_s)
        if self.random.random() < 0.3:
            node.lending.command(command, 1, self.town.now_s)

    def drain(self, node: Node) -> None:
        node.core.draining = not node.core.draining

    def restart(self, node: Node) -> None:
        new = self.town.restart(node.name)
        for other in self.town.everybody():
            if other is not new and self.random.random() < 0.5:
                other.lending.peer_lost(node.name, new.me.incarnation, self.town.now_s)

    def cut(self, node: Node) -> None:
        self.town.weather.cut.clear()
        pair = frozenset((node.name, self.any_node().name))
        if len(pair) == 2 and self.random.random() < 0.6:
            self.town.weather.cut.add(pair)

    def silence(self, node: Node) -> None:
        self.town.weather.manager = self.random.random() < 0.7

    def damage(self, node: Node) -> None:
        """A replica is found to be wrong, and dropped."""
        for shard in list(node.core.shards)[:1]:
            node.core.drop(shard, self.random.choice(["damaged", "purged"]), "", self.town.now_s)

    def lose(self, node: Node) -> None:
        for other in self.town.everybody():
            if other is not node:
                other.lending.peer_lost(node.name, 0, self.town.now_s)


@pytest.mark.parametrize("seed", range(30))
def test_on_a_network_that_only_loses_and_repeats_no_block_is_lost(seed: int) -> None:
    history = History(seed, rough=False)
    history.live()
    history.calm_down()
    assert not history.town.missing()
    history.town.check_balance()


@pytest.mark.parametrize("seed", range(1000, 1050))
def test_whatever_dies_the_books_balance_and_nothing_leaks(seed: int) -> None:
    history = History(seed, rough=True)
    town = history.town
    history.live()
    history.calm_down()
    town.check_balance()
    for name, gone in town.missing().items():
        for each in gone:
            assert LOSSES & set(town[name].told(each)), "nobody can explain where it is"

    for node in town.everybody():
        for needed in list(node.needed):
            node.forget(needed)
        assert all(room.state is not RoomState.WAITING for room in node.rooms)
    town.run(3 * LOAN_S)

    for node in town.everybody():
        node.check()
        assert not node.loans()
        assert not node.core.shards._claims
        books = node.core.books()
        assert not books.reserved_bytes
        assert not books.quarantined_bytes
        assert list(node.core.sessions.values()) == [node.desk.session]
        assert node.lending.due_s() == float("inf")
