"""The step model finds the parameters that made the steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfabric.lending.stepmodel import DEFAULT, MIN_STEPS, StepFit, StepModel
from kvfabric.rpc.v1.control_pb2 import StepSums

Step = tuple[float, float, float]  # batch, tokens, seconds


def sums(steps: Sequence[Step]) -> StepSums:
    def total(each: Callable[[float, float, float], float]) -> float:
        return float(sum(each(*step) for step in steps))

    return StepSums(
        steps=len(steps),
        batch=total(lambda b, t, s: b),
        tokens=total(lambda b, t, s: t),
        seconds=total(lambda b, t, s: s),
        batch_batch=total(lambda b, t, s: b * b),
        batch_tokens=total(lambda b, t, s: b * t),
        tokens_tokens=total(lambda b, t, s: t * t),
        batch_seconds=total(lambda b, t, s: b * s),
        tokens_seconds=total(lambda b, t, s: t * s),
    )


def steps(model: StepModel, count: int, noise: float = 0.0, seed: int = 1) -> list[Step]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        batch = rng.randint(1, 64)
        tokens = batch * rng.randint(100, 4000)
        seconds = model.seconds(batch, tokens) * (1 + noise * rng.uniform(-1, 1))
        made.append((float(batch), float(tokens), seconds))
    return made


def agree(found: StepModel, made: StepModel) -> bool:
    return (
        abs(found.step_s / made.step_s - 1) < 0.1
        and abs(found.request_s / made.request_s - 1) < 0.2
        and abs(found.token_s / made.token_s - 1) < 0.1
    )


def test_seconds_and_tokens_per_second() -> None:
    model = StepModel(0.5, 0.25, 0.001)
    assert model.seconds(2, 1000) == 2.0
    assert model.tokens_per_s(2, 1000) == 1.0
    assert model.tokens_per_s(0, 0) == 0.0


def test_without_steps_it_is_the_default() -> None:
    fit = StepFit()
    assert fit.model == DEFAULT
    assert fit.steps == fit.mean_tokens == 0


def test_a_few_steps_scale_the_default() -> None:
    slow = StepModel(DEFAULT.step_s * 7, DEFAULT.request_s * 7, DEFAULT.token_s * 7)
    fit = StepFit()
    fit.take(sums(steps(slow, MIN_STEPS // 2)))
    assert fit.model.step_s == pytest.approx(slow.step_s)
    assert fit.model.token_s == pytest.approx(slow.token_s)


@pytest.mark.parametrize(
    "made", [StepModel(0.03, 2e-3, 1e-6), StepModel(1e-3, 5e-4, 2e-8), StepModel(2.0, 0.2, 1e-4)]
)
def test_enough_steps_give_the_parameters_that_made_them(made: StepModel) -> None:
    fit = StepFit()
    for seed in range(5):
        fit.take(sums(steps(made, 200, noise=0.05, seed=seed)))
    assert agree(fit.model, made)
    assert fit.steps == pytest.approx(1000, rel=0.05)


def test_steps_that_are_all_alike_keep_the_shape_and_give_their_own_time() -> None:
    fit = StepFit()
    fit.take(sums([(4.0, 4000.0, 0.5)] * 500))
    assert fit.model.seconds(4, 4000) == pytest.approx(0.5)
    ratio = fit.model.step_s / fit.model.token_s
    assert ratio == pytest.approx(DEFAULT.step_s / DEFAULT.token_s, rel=0.01)
    assert fit.mean_tokens == pytest.approx(4000)


def test_no_parameter_is_negative_where_more_requests_seem_to_be_faster() -> None:
    rng = random.Random(3)
    odd = [(float(b), float(rng.randint(1, 9)), 1.0 - 0.01 * b) for b in range(1, 65)] * 3
    fit = StepFit()
    fit.take(sums(odd))
    assert fit.model.request_s == 0.0
    assert fit.model.step_s > 0
    assert fit.model.token_s >= 0


def test_old_steps_fade() -> None:
    before, now = StepModel(0.5, 0.01, 1e-5), StepModel(0.05, 0.001, 1e-6)
    fit = StepFit(half_life_steps=100)
    fit.take(sums(steps(before, 1000)))
    for seed in range(10):
        fit.take(sums(steps(now, 200, seed=seed)))
    assert agree(fit.model, now)


@pytest.mark.parametrize(
    "nonsense",
    [
        StepSums(),
        StepSums(steps=10),
        StepSums(steps=10, seconds=float("nan")),
        StepSums(steps=10, seconds=-1.0),
        StepSums(steps=10, seconds=1.0, tokens=float("inf")),
        StepSums(steps=10, seconds=1.0, tokens_tokens=1e300),
    ],
)
def test_sums_that_cannot_be_are_ignored(nonsense: StepSums) -> None:
    fit = StepFit()
    fit.take(nonsense)
    assert fit.model == DEFAULT


@given(
    st.lists(
        st.tuples(st.floats(0, 1e4), st.floats(0, 1e9), st.floats(1e-9, 1e4)),
        min_size=1,
        max_size=200,
    )
)
def test_whatever_was_measured_a_step_takes_some_time(made: list[Step]) -> None:
    fit = StepFit()
    fit.take(sums(made))
    model = fit.model
    assert min(model.step_s, model.request_s, model.token_s) >= 0
    assert model.seconds(1, 1) > 0
