"""Steps: only sums are kept of what engines measured, and only once."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfabric.errors import Refused
from kvfabric.rpc.v1 import node_pb2
from kvfabric_nodes.sequences.steps import REPORTED_STEPS, Steps

Report = node_pb2.ReportStepsRequest

MEASURED = st.lists(
    st.tuples(st.integers(0, 4096), st.integers(0, 1 << 30), st.floats(0, 100, width=32)),
    max_size=20,
)


@given(reports=st.lists(MEASURED, min_size=1, max_size=4))
def test_sums_over_all_reports(reports: list[list[tuple[int, int, float]]]) -> None:
    steps = Steps()
    for report in reports:
        steps.add(
            Report(
                batch=[batch for batch, _, _ in report],
                tokens=[tokens for _, tokens, _ in report],
                seconds=[seconds for _, _, seconds in report],
                waiting=len(report),
            )
        )

    sums = steps.take()

    assert sums is not None
    every = [step for report in reports for step in report]
    assert sums.steps == len(every)
    assert sums.tokens_tokens == pytest.approx(sum(t * t for _, t, _ in every))
    assert sums.batch_tokens == pytest.approx(sum(b * t for b, t, _ in every))
    assert sums.batch_batch == pytest.approx(sum(b * b for b, _, _ in every))
    assert sums.tokens_seconds == pytest.approx(sum(t * s for _, t, s in every))
    assert sums.batch_seconds == pytest.approx(sum(b * s for b, _, s in every))
    assert (sums.batch, sums.tokens) == (sum(b for b, _, _ in every), sum(t for _, t, _ in every))
    assert sums.seconds == pytest.approx(sum(s for _, _, s in every))
    assert sums.waiting == len(reports[-1])
    assert steps.take() is None


@pytest.mark.parametrize(
    ("report", "why"),
    [
        (Report(batch=[1], tokens=[1, 2], seconds=[1]), "one of each per step"),
        (Report(batch=[1], tokens=[1], seconds=[math.nan]), "not finite"),
        (Report(batch=[1], tokens=[1], seconds=[-0.5]), "negative"),
        (
            Report(
                batch=[1] * (REPORTED_STEPS + 1),
                tokens=[1] * (REPORTED_STEPS + 1),
                seconds=[1.0] * (REPORTED_STEPS + 1),
            ),
            f"the limit is {REPORTED_STEPS}",
        ),
    ],
)
def test_what_is_no_measurement_is_refused_whole(report: Report, why: str) -> None:
    steps = Steps()

    with pytest.raises(Refused, match=why):
        steps.add(report)

    assert steps.take() is None
