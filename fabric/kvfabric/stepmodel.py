"""How long one step of a serving instance takes, and the fit of that to measured steps.

Infinite-LLM (arXiv 2401.02669) models a layer's time as

    T_layer = W(b) / f(b) + sum_r S_r / g(S)

where b is the batch, W(b) the work outside of attention and f(b) the speed at which it is
done, S_r the context of request r and g(S) the speed of attention over the S tokens of all.
Outside of attention a step reads the weights once and computes for each request: that is
affine in b. Attention reads the KV of every token once, at the memory's speed: that is
linear in S. Over all layers this leaves

    T = a + b * batch + c * tokens

whose three parameters are measured while an engine runs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfabric.rpc.v1 import control_pb2

MIN_STEPS = 64  # of them the default's shape is kept and only scaled
HALF_LIFE_STEPS = 20_000.0  # older steps count half: engines and their load change
_RIDGE = 1e-4  # pull towards the scaled default where steps do not tell parameters apart

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepModel:
    """Seconds of a step; none of the three is negative, and not all are 0."""

    step_s: float  # a
    request_s: float  # b, per request in the batch
    token_s: float  # c, per token attended

    def seconds(self, batch: float, tokens: float) -> float:
        """Of a step with so many requests that attend so many tokens in all."""
        return self.step_s + self.request_s * batch + self.token_s * tokens

    def tokens_per_s(self, batch: float, tokens: float) -> float:
        """Tokens generated a second: one per request and step."""
        return batch / self.seconds(batch, tokens) if batch else 0.0


# 7 billion parameters of 16 bits on a device of 312 TFLOP/s and 1.5 TB/s, of which half and
# nine tenths are had: the weights are read once a step, each request takes 14 GFLOP, each
# token has 512 KiB of KV (32 layers, 4,096 wide, no grouping). Llama 2 7B on an A100.
DEFAULT = StepModel(step_s=1.0e-2, request_s=9.0e-5, token_s=3.9e-7)


class StepFit:
    """The parameters of one instance, by least squares over the steps that it reported.

    Old steps fade. Few steps, or steps that are all alike, leave the default's shape,
    scaled to the time that was measured.
    """

    def __init__(self, default: StepModel = DEFAULT, half_life_steps: float = HALF_LIFE_STEPS):
        self._default = np.array([default.step_s, default.request_s, default.token_s])
        self._half_life_steps = half_life_steps
        self._steps = 0.0
        self._products: NDArray[np.float64] = np.zeros((3, 3))  # sums of x x^T, x = (1, b, t)
        self._targets: Vector = np.zeros(3)  # sums of x * seconds
        self._model: StepModel | None = default

    @property
    def steps(self) -> float:
        """Steps that the fit stands on, older ones counted for less."""
        return self._steps

    @property
    def model(self) -> StepModel:
        """As fitted to all steps so far."""
        if self._model is None:
            self._model = self._fit()
        return self._model

    @property
    def mean_tokens(self) -> float:
        """Tokens attended in a step, on average; 0 before the first."""
        return float(self._products[0, 2]) / self._steps if self._steps else 0.0

    def take(self, sums: control_pb2.StepSums) -> None:
        """Some more steps. Sums that cannot be are ignored."""
        values = (
            float(sums.steps),
            sums.batch,
            sums.tokens,
            sums.seconds,
            sums.batch_batch,
            sums.batch_tokens,
            sums.tokens_tokens,
            sums.batch_seconds,
            sums.tokens_seconds,
        )
        if not sums.steps or not np.isfinite(values).all() or min(values) < 0 or not sums.seconds:
            return
        fade = 0.5 ** (min(values[0], self._half_life_steps * 16) / self._half_life_steps)
        steps, batch, tokens, seconds, bb, bt, tt, bs, ts = values
        self._steps = self._steps * fade + steps
        self._products = self._products * fade + np.array(
            [[steps, batch, tokens], [batch, bb, bt], [tokens, bt, tt]]
        )
        self._targets = self._targets * fade + np.array([seconds, bs, ts])
        self._model = None

    def _fit(self) -> StepModel:
        expected = float(self._products[0] @ self._default)
        prior = self._default * (float(self._targets[0]) / expected)
        if self._steps < MIN_STEPS:
            return StepModel(*prior.tolist())
        # In units of each column's own size, so that one ridge serves all three.
        scale = np.sqrt(np.maximum(np.diag(self._products), 1e-300))
        ridge = _RIDGE * np.eye(3)
        products = self._products / np.outer(scale, scale) + ridge
        targets = self._targets / scale + ridge @ (prior * scale)
        best = _least_squares(products, targets) / scale
        return StepModel(*best.tolist()) if best.any() else StepModel(*prior.tolist())


def _least_squares(products: NDArray[np.float64], targets: Vector) -> Vector:
    """The x >= 0 with the least x^T P x - 2 t^T x; three unknowns, so all supports are tried."""
    best, best_cost = np.zeros(3), 0.0
    for size in (3, 2, 1):
        for support in itertools.combinations(range(3), size):
            index = np.array(support)
            part = np.linalg.solve(products[np.ix_(index, index)], targets[index])
            if (part < 0).any():
                continue
            cost = -float(targets[index] @ part)
            if cost < best_cost:
                best_cost = cost
                best = np.zeros(3)
                best[index] = part
    return best
