"""All that a plan is made from, as it was at one moment, in the planner's columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvfabric.lending.demand import UNKNOWN, Contexts, Floats, Instances, Ints
from kvfabric.lending.placement import Candidate
from kvfabric.lending.stepmodel import StepModel
from kvfabric.manager.outlook import Told


@dataclass(frozen=True, slots=True)
class Want:
    """One node, as the planner is to see it."""

    candidate: Candidate
    model: StepModel
    batch: int
    waiting: int
    attended: float  # tokens in a step
    told: Told
    held: bool  # it carries a plan out: it neither lends nor borrows by another


class Demand:
    """Made under the core's lock, read without: columns are made when they are used."""

    def __init__(self, wants: list[Want], rates: dict[tuple[int, int], float]) -> None:
        self._wants = wants
        self.rates = rates  # bytes a second from node i to node j, as measured

    @cached_property
    def contexts(self) -> Contexts:
        """The sequences of nodes that may be debtors."""
        wanted = [(index, want.told) for index, want in enumerate(self._wants) if not want.held]
        empty = np.zeros(0)
        counts = [len(told) for _, told in wanted]
        return Contexts(
            np.repeat(np.array([index for index, _ in wanted], dtype=np.int64), counts),
            np.concatenate([empty.astype(np.uint64), *(told.sequence for _, told in wanted)]),
            np.concatenate([empty, *(told.tokens for _, told in wanted)]),
            np.concatenate([empty, *(told.local_bytes for _, told in wanted)]),
            np.concatenate([empty, *(told.remote_bytes for _, told in wanted)]),
            np.concatenate([empty, *(told.block_bytes for _, told in wanted)]),
        )

    @cached_property
    def instances(self) -> Instances:
        """All living nodes. A step attends at least the tokens of the known sequences."""
        wants = self._wants
        sites = [want.candidate.site for want in wants]
        known = np.array([float(want.told.tokens.sum()) for want in wants])
        return Instances(
            [site.node for site in sites],
            _numbered([site.host for site in sites]),
            _numbered([f"{site.zone}/{site.rack}" if site.rack else "" for site in sites]),
            _numbered([site.zone for site in sites]),
            capacity_bytes=_floats([want.candidate.capacity_bytes for want in wants]),
            room_bytes=_floats([want.candidate.room_bytes for want in wants]),
            lendable_bytes=_floats([want.candidate.lendable_bytes for want in wants]),
            borrowed_bytes=_floats(
                [want.candidate.borrowed_bytes or int(want.held) for want in wants]
            ),
            draining=np.array([want.candidate.draining for want in wants], dtype=bool),
            batch=_floats([want.batch for want in wants]),
            waiting=_floats([want.waiting for want in wants]),
            tokens=np.maximum(known, _floats([want.attended for want in wants])),
            step_s=_floats([want.model.step_s for want in wants]),
            request_s=_floats([want.model.request_s for want in wants]),
            token_s=_floats([want.model.token_s for want in wants]),
        )


def _floats(values: list[int] | list[float]) -> Floats:
    return np.array(values, dtype=np.float64)


def _numbered(names: list[str]) -> Ints:
    """Equal names get equal numbers, empty ones UNKNOWN."""
    numbers: dict[str, int] = {}
    return np.array(
        [numbers.setdefault(name, len(numbers)) if name else UNKNOWN for name in names],
        dtype=np.int64,
    )
