"""What one node's engines do: its step model, its queue, its largest sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvfabric.lending.demand import Floats
from kvfabric.lending.stepmodel import StepFit
from kvfabric.rpc.v1 import control_pb2

STALE_S = 10.0  # an engine that reported no step for so long is taken to be idle


class Told:
    """A node's report of its sequences, never changed. Its columns are made when they are used:
    nodes report more often than plans are made.
    """

    def __init__(self, sequences: control_pb2.Sequences | None = None) -> None:
        self._told = control_pb2.Sequences()
        if sequences is not None:
            self._told.CopyFrom(sequences)

    def __len__(self) -> int:
        return len(self._told.sequence)

    @cached_property
    def sequence(self) -> NDArray[np.uint64]:
        return np.array(self._told.sequence[:], dtype=np.uint64)

    @cached_property
    def tokens(self) -> Floats:
        return np.array(self._told.tokens[:], dtype=np.float64)

    @cached_property
    def local_bytes(self) -> Floats:
        return np.array(self._told.local_bytes[:], dtype=np.float64)

    @cached_property
    def remote_bytes(self) -> Floats:
        return np.array(self._told.remote_bytes[:], dtype=np.float64)

    @cached_property
    def block_bytes(self) -> Floats:
        return np.array(self._told.block_bytes[:], dtype=np.float64)

    def remote_of(self, sequence: int) -> int | None:
        """Bytes of a sequence on loan; None where it is not among the reported."""
        for number, remote_bytes in zip(self._told.sequence, self._told.remote_bytes, strict=True):
            if number == sequence:
                return remote_bytes
        return None


@dataclass(slots=True)
class Outlook:
    """See the module."""

    fit: StepFit = field(default_factory=StepFit)
    batch: int = 0
    waiting: int = 0
    stepped_s: float = 0.0
    told: Told = field(default_factory=Told)

    def take_steps(self, sums: control_pb2.StepSums, now_s: float) -> None:
        """What engines measured since the last report, and their queue now."""
        self.fit.take(sums)
        self.batch, self.waiting, self.stepped_s = sums.last_batch, sums.waiting, now_s

    def rest(self, now_s: float) -> None:
        """Engines that report no steps any more have no queue either."""
        if self.stepped_s + STALE_S < now_s:
            self.batch = self.waiting = 0

    @property
    def attended(self) -> float:
        """Tokens that a step attends, as measured; 0 for an idle engine."""
        return self.fit.mean_tokens if self.batch else 0.0
