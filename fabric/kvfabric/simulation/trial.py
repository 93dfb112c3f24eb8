"""One run of a simulated cluster under a workload, with or without lending, and its figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvfabric.simulation.auditor import place_of
from kvfabric.simulation.control import Costs, Stopwatch
from kvfabric.simulation.nodes import Factory, Shape
from kvfabric.simulation.parameters import LINKS, Setup
from kvfabric.simulation.serving import Engines, Tally
from kvfabric.simulation.workload import requests
from kvfabric.simulation.world import Plan, World

SEGMENT_BLOCKS = 16
SAMPLES = 240  # of every node's memory, over the run
AUDITED = 2  # nodes whose books are proven each simulated second, in turn; all at the end


@dataclass(slots=True)
class Trial:
    """What a run came to. Times of the machine that ran it are in `costs`."""

    workload: str
    lending: bool
    nodes: int
    seed: int
    simulated_s: float
    counted_s: float
    tally: Tally
    costs: Costs
    fills: list[list[float]] = field(default_factory=list)  # per sample: used share per node
    sample_s: float = 1.0
    moved_bytes: int = 0
    cached_bytes: int = 0  # what nobody needs, at the end
    lent_bytes: int = 0  # at the most, of all nodes together
    directory_keys: int = 0  # at the most
    open_sequences: int = 0  # at the most
    waiting: int = 0  # in queues at the end
    violations: list[str] = field(default_factory=list)
    digest: str = ""

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated a second, of the whole cluster."""
        return self.tally.produced / self.counted_s

    @property
    def served_per_s(self) -> float:
        """Prompt and output tokens of finished requests a second: what vLLM's bench counts."""
        return self.tally.served_tokens / self.counted_s

    @property
    def imbalance(self) -> float:
        """Standard deviation of the nodes' used share of memory, averaged over the run."""
        later = self.fills[len(self.fills) // 4 :] or [[0.0]]
        return statistics.fmean(statistics.pstdev(sample) for sample in later)

    @property
    def fill(self) -> float:
        """Used share of all memory, averaged over the run."""
        later = self.fills[len(self.fills) // 4 :] or [[0.0]]
        return statistics.fmean(statistics.fmean(sample) for sample in later)


def shape_of(setup: Setup) -> Shape:
    """The memory of one node, in whole segments."""
    segment_bytes = SEGMENT_BLOCKS * setup.block_bytes
    return Shape(
        segments=setup.engine.kv_bytes // segment_bytes,
        segment_bytes=segment_bytes,
        block_bytes=setup.block_bytes,
        block_tokens=setup.block_tokens,
        layers=1,
        lending=setup.lending,
        cap_share=setup.cap_share,
        heartbeat_s=setup.heartbeat_s,
    )


def run(
    setup: Setup,
    make: Factory,
    stopwatch: Stopwatch = lambda: 0.0,
    progress: Callable[[float], object] = lambda share: None,
) -> Trial:
    """The whole run; `progress` is told how much of it is done."""
    shape = shape_of(setup)
    plan = Plan(
        setup.nodes,
        shape,
        LINKS,
        setup.silence_s,
        setup.nodes_per_host,
        setup.hosts_per_rack,
        tick_s=setup.quantum_s,
    )
    world = World(plan, setup.seed, make, stopwatch)
    simulation = world.simulation
    arrivals = requests(setup.workload, setup.nodes, setup.sequences, setup.seed)
    memories = [world.nodes[name] for name in world.names]
    blocks = shape.segments * SEGMENT_BLOCKS
    engines = Engines(setup, memories, arrivals, blocks, simulation.after)
    end_s = setup.window_s
    trial = Trial(
        setup.workload.name,
        setup.lending,
        setup.nodes,
        setup.seed,
        end_s,
        end_s - setup.warm_s,
        engines.tally,
        world.costs,
        sample_s=max(setup.quantum_s, end_s / SAMPLES),
    )
    simulation.every(setup.quantum_s, lambda: engines.tick(simulation.now_s), setup.quantum_s)
    simulation.every(trial.sample_s, lambda: _sample(world, engines, trial), trial.sample_s)
    steps = max(1, math.ceil(end_s))
    for step in range(1, steps + 1):
        simulation.run(end_s * step / steps)
        progress(step / steps)
        first = step * AUDITED % setup.nodes
        _audit(world, trial, world.names[first : first + AUDITED])
    _audit(world, trial, world.names)
    trial.moved_bytes = sum(node.copied_bytes() for node in world.nodes.values())
    trial.cached_bytes = sum(node.cached_bytes() for node in world.nodes.values())
    trial.waiting = sum(map(len, engines.queues))
    trial.digest = simulation.digest()
    simulation.close()
    return trial


def _sample(world: World, engines: Engines, trial: Trial) -> None:
    capacity = world.plan.shape.capacity_bytes
    trial.fills.append([node.used_bytes() / capacity for node in world.nodes.values()])
    lent = sum(node.lent_bytes() for node in world.nodes.values())
    trial.lent_bytes = max(trial.lent_bytes, lent)
    trial.open_sequences = max(trial.open_sequences, engines.open_sequences)
    if world.manager is not None:
        trial.directory_keys = max(trial.directory_keys, world.manager.core.keys)


def _audit(world: World, trial: Trial, names: Sequence[str]) -> None:
    try:
        for name in names:
            world.nodes[name].check()
    except Exception as error:
        trial.violations.append(f"at {world.simulation.now_s:.2f} s: {place_of(error)}")
