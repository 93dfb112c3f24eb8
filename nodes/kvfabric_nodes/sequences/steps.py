"""What engines measured of their own steps, as sums for the next heartbeat."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvfabric.errors import Refused
from kvfabric.rpc.v1 import control_pb2, node_pb2

REPORTED_STEPS = 4096  # in one call


class Steps:
    """Sums over all steps since the last `take`."""

    def __init__(self) -> None:
        self._sums: control_pb2.StepSums | None = None

    def add(self, report: node_pb2.ReportStepsRequest) -> None:
        """Takes one call's steps in. Refused, with nothing taken, where one is no measurement."""
        if not len(report.batch) == len(report.tokens) == len(report.seconds):
            raise Refused(
                f"{len(report.batch)} batches, {len(report.tokens)} tokens and "
                f"{len(report.seconds)} seconds: give one of each per step"
            )
        if len(report.batch) > REPORTED_STEPS:
            raise Refused(f"{len(report.batch)} steps in one call; the limit is {REPORTED_STEPS}")
        if not all(math.isfinite(s) and s >= 0 for s in report.seconds):
            raise Refused("a step took a time that is negative or not finite")
        batches, tokens = list(report.batch), list(report.tokens)
        seconds = list(report.seconds)
        sums = self._sums = self._sums or control_pb2.StepSums()
        sums.steps += len(batches)
        sums.batch += sum(batches)
        sums.tokens += sum(tokens)
        sums.seconds += sum(seconds)
        sums.batch_batch += _dot(batches, batches)
        sums.batch_tokens += _dot(batches, tokens)
        sums.tokens_tokens += _dot(tokens, tokens)
        sums.batch_seconds += _dot(batches, seconds)
        sums.tokens_seconds += _dot(tokens, seconds)
        if batches:
            sums.last_batch = batches[-1]
        sums.waiting = report.waiting

    def take(self) -> control_pb2.StepSums | None:
        """The sums, which start anew; None: no engine has told of anything since."""
        taken, self._sums = self._sums, None
        return taken


def _dot(first: Sequence[float], second: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(first, second, strict=True))
