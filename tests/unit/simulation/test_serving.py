"""Engines: what they produce, whom they admit and preempt, on memories that only count."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest

from kvfabric.simulation.engine import Simulation
from kvfabric.simulation.parameters import UNIFORM, Engine, Setup
from kvfabric.simulation.serving import Engines
from kvfabric.simulation.workload import Request, requests

BLOCK_TOKENS = 512


class NaiveMemory:
    """Blocks as counts, an oracle; with `neighbours` it takes theirs where it has none."""

    def __init__(self, number: int, blocks: int, block_tokens: int, token_bytes: int) -> None:
        self.number = number
        self.free = blocks
        self.neighbours: list[NaiveMemory] = []
        self._block_tokens = block_tokens
        self._block_bytes = block_tokens * token_bytes
        self._held: dict[int, list[NaiveMemory]] = {}

    def room(self, blocks: int, owed: int) -> bool:
        free = self.free + sum(each.free for each in self.neighbours)
        return free >= blocks + owed

    def open(self, request: int, tokens: int) -> bool:
        self._held[request] = []
        return True

    def grow(self, request: int, tokens: int) -> int:
        held = self._held[request]
        while len(held) * self._block_tokens < tokens:
            source = max([self, *self.neighbours], key=lambda each: (each is self, each.free))
            if not source.free:
                source = max([self, *self.neighbours], key=lambda each: each.free)
            if not source.free:
                break
            source.free -= 1
            held.append(source)
        return len(held) * self._block_tokens

    def close(self, request: int, *, drop: bool = True) -> None:
        for source in self._held.pop(request):
            source.free += 1

    def lent(self) -> Mapping[int, int]:
        found: dict[int, int] = {}
        for held in self._held.values():
            for source in held:
                if source is not self:
                    found[source.number] = found.get(source.number, 0) + self._block_bytes
        return found

    def stepped(self, batch: int, tokens: int, seconds: float, steps: float, waiting: int) -> None:
        """Nobody asks."""


class Bench:
    """Engines on counting memories, and the time that passes."""

    def __init__(
        self, arrivals: list[Request], nodes: int = 1, blocks: int = 100, *, shared: bool = False
    ) -> None:
        self.setup = Setup(
            nodes=nodes, sequences=1, lending=shared, block_tokens=BLOCK_TOKENS, workload=UNIFORM
        )
        self.simulation = Simulation(1)
        token_bytes = self.setup.engine.token_bytes
        self.memories = [
            NaiveMemory(number, blocks, BLOCK_TOKENS, token_bytes) for number in range(nodes)
        ]
        for memory in self.memories if shared else ():
            memory.neighbours = [each for each in self.memories if each is not memory]
        self.blocks = blocks
        self.engines = Engines(
            self.setup, self.memories, iter(arrivals), blocks, self.simulation.after
        )
        quantum_s = self.setup.quantum_s
        self.simulation.every(
            quantum_s, lambda: self.engines.tick(self.simulation.now_s), quantum_s
        )

    def run(self, seconds: float) -> None:
        self.simulation.run(self.simulation.now_s + seconds)


def request(number: int, prompt: int, output: int, node: int = 0, at_s: float = 0.0) -> Request:
    return Request(number, at_s, node, "test", prompt, output)


def test_a_lone_request_runs_at_the_step_models_speed() -> None:
    bench = Bench([request(1, 1000, 4000)])
    bench.run(20.0)
    speed = 1 / Engine().step_s(1, 1300)
    assert bench.engines.tally.produced == pytest.approx(20.0 * speed, rel=0.05)


def test_every_output_token_is_counted_once_and_all_memory_comes_back() -> None:
    arrivals = [request(n, 700, 50 + n, at_s=0.1 * n) for n in range(1, 30)]
    bench = Bench(arrivals, blocks=12)
    bench.run(200.0)
    tally = bench.engines.tally
    assert tally.finished == len(arrivals)
    assert tally.produced == sum(each.output for each in arrivals)
    assert tally.longest == 700 + 79
    assert bench.engines.idle
    assert bench.memories[0].free == 12


def test_a_request_waits_until_its_prompt_has_room_and_those_behind_it_wait_too() -> None:
    bench = Bench([request(1, 40 * 512, 400), request(2, 80 * 512, 10), request(3, 100, 10)])
    bench.run(2.0)
    assert bench.engines.open_sequences == 1
    assert len(bench.engines.queues[0]) == 2
    bench.run(60.0)
    assert bench.engines.tally.finished == 3


def test_what_could_never_fit_is_rejected_at_once() -> None:
    bench = Bench([request(1, 200 * 512, 10), request(2, 100, 10)])
    bench.run(5.0)
    assert bench.engines.tally.rejected == 1
    assert bench.engines.tally.finished == 1


def test_when_room_runs_out_the_latest_is_preempted_and_finishes_later() -> None:
    arrivals = [request(n, 512 * 4 - 10, 600, at_s=n / 100) for n in range(1, 4)]
    bench = Bench(arrivals, blocks=16)  # three of four blocks each fit, with five they do not
    bench.run(120.0)
    tally = bench.engines.tally
    assert tally.preempted >= 1
    assert tally.finished == 3
    assert tally.produced == sum(each.output for each in arrivals)  # none twice
    assert bench.memories[0].free == 16


def test_a_shared_memory_serves_what_no_node_could_and_the_debtor_pays_for_the_links() -> None:
    arrivals = [request(1, 150 * 512, 100)]
    alone, shared = Bench(arrivals, nodes=2), Bench(arrivals, nodes=2, shared=True)
    alone.run(30.0)
    shared.run(30.0)
    assert alone.engines.tally.rejected == 1
    assert shared.engines.tally.longest == 150 * 512 + 100


def test_a_creditor_is_slower_for_the_kv_that_it_attends_for_others() -> None:
    def speed(*extra: Request) -> float:
        arrivals = [request(1, 1000, 5000, node=1), *extra]
        bench = Bench(arrivals, nodes=2, blocks=400, shared=True)
        bench.run(5.0)
        before = bench.engines.tally.produced
        bench.run(10.0)
        return bench.engines.tally.produced - before

    alone = speed()
    long = request(2, 500 * 512, 5000, node=0)
    both = speed(long)
    assert both < 2 * alone  # of two, the first is slower than it was alone


def test_equal_lengths_gain_nothing_by_sharing_and_lose_nothing() -> None:
    made = {}
    for shared in (False, True):
        arrivals = list(requests(UNIFORM, 4, 1000, 1))
        bench = Bench(arrivals, nodes=4, blocks=832, shared=shared)
        bench.run(25.0)
        made[shared] = bench.engines.tally.produced
    assert made[True] == pytest.approx(made[False], rel=0.02)


def test_numbers_of_requests_are_in_the_order_of_arrival() -> None:
    found = list(requests(UNIFORM, 4, 100, 1))
    assert all(a.id < b.id and a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(found))
