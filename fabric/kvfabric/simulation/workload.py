"""Requests: when they arrive, at which instance, and how long they are. One seed, one list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from kvfabric.simulation.parameters import Kind, Workload


@dataclass(frozen=True, slots=True)
class Request:
    """One request as its client sends it."""

    id: int
    arrival_s: float
    node: int
    kind: str
    prompt: int
    output: int

    @property
    def tokens(self) -> int:
        """KV at its end."""
        return self.prompt + self.output


def requests(workload: Workload, nodes: int, count: int, seed: int) -> Iterator[Request]:
    """`count` requests in the order of their arrival: a Poisson process at every instance."""
    random = Random(f"requests {workload.name} {seed}")
    now_s = 0.0
    for number in range(1, count + 1):
        now_s += random.expovariate(workload.per_second * nodes)
        kind = _kind(workload, random.random())
        yield Request(
            number,
            now_s,
            int(random.randrange(max(1, int(nodes * kind.instances))) / kind.instances),
            kind.name,
            kind.prompt.at(random.random(), random.gauss(0.0, 1.0)),
            kind.output.at(random.random(), random.gauss(0.0, 1.0)),
        )


def _kind(workload: Workload, at: float) -> Kind:
    for kind in workload.kinds:
        at -= kind.share
        if at < 0:
            return kind
    return workload.kinds[-1]
