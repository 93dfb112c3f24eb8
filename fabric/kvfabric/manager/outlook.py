"""What one node's engines do: its step model, its queue, its largest sequences, as columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvfabric.demand import Floats
from kvfabric.rpc.v1 import control_pb2
from kvfabric.stepmodel import StepFit

STALE_S = 10.0  # an engine that reported no step for so long is taken to be idle


def _none() -> Floats:
    return np.zeros(0)


@dataclass(slots=True)
class Outlook:
    """See the module. Columns are replaced as a whole, never changed."""

    fit: StepFit = field(default_factory=StepFit)
    batch: int = 0
    waiting: int = 0
    stepped_s: float = 0.0
    sequence: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    tokens: Floats = field(default_factory=_none)
    local_bytes: Floats = field(default_factory=_none)
    remote_bytes: Floats = field(default_factory=_none)
    block_bytes: Floats = field(default_factory=_none)

    def take_steps(self, sums: control_pb2.StepSums, now_s: float) -> None:
        """What engines measured since the last report, and their queue now."""
        self.fit.take(sums)
        self.batch, self.waiting, self.stepped_s = sums.last_batch, sums.waiting, now_s

    def take_sequences(self, sequences: control_pb2.Sequences) -> None:
        """The node's largest sequences now, in place of those before."""
        count = len(sequences.sequence)
        self.sequence = np.fromiter(sequences.sequence, np.uint64, count)
        self.tokens = np.fromiter(sequences.tokens, np.float64, count)
        self.local_bytes = np.fromiter(sequences.local_bytes, np.float64, count)
        self.remote_bytes = np.fromiter(sequences.remote_bytes, np.float64, count)
        self.block_bytes = np.fromiter(sequences.block_bytes, np.float64, count)

    def rest(self, now_s: float) -> None:
        """Engines that report no steps any more have no queue either."""
        if self.stepped_s + STALE_S < now_s:
            self.batch = self.waiting = 0

    @property
    def attended(self) -> float:
        """Tokens that a step attends: as measured, at least those of the known sequences."""
        return max(self.fit.mean_tokens if self.batch else 0.0, float(self.tokens.sum()))

    def remote_of(self, sequence: int) -> float | None:
        """Bytes of a sequence on loan; None where it is not among the reported."""
        found = np.flatnonzero(self.sequence == np.uint64(sequence))
        return float(self.remote_bytes[found[0]]) if len(found) else None
