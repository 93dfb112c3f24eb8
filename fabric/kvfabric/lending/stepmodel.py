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
import math
import operator
from dataclasses import dataclass

from kvfabric.rpc.v1 import control_pb2

MIN_STEPS = 64  # of them the default's shape is kept and only scaled
HALF_LIFE_STEPS = 20_000.0  # older steps count half: engines and their load change
_RIDGE = 1e-4  # pull towards the scaled default where steps do not tell parameters apart
_MOST = 1e100  # of a sum; more is nonsense and would overflow


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

    def __init__(
        self, default: StepModel = DEFAULT, half_life_steps: float = HALF_LIFE_STEPS
    ) -> None:
        self._default = [default.step_s, default.request_s, default.token_s]
        self._half_life_steps = half_life_steps
        # Sums over steps of x x^T and of x * seconds, where x = (1, batch, tokens).
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3
        self._model: StepModel | None = default

    @property
    def steps(self) -> float:
        """Steps that the fit stands on, older ones counted for less."""
        return self._products[0][0]

    @property
    def model(self) -> StepModel:
        """As fitted to all steps so far."""
        if self._model is None:
            self._model = self._fit()
        return self._model

    @property
    def mean_tokens(self) -> float:
        """Tokens attended in a step, on average; 0 before the first."""
        return self._products[0][2] / self.steps if self.steps else 0.0

    def take(self, sums: control_pb2.StepSums) -> None:
        """Some more steps. Sums that cannot be are ignored."""
        steps, batch, tokens = float(sums.steps), sums.batch, sums.tokens
        products = [
            [steps, batch, tokens],
            [batch, sums.batch_batch, sums.batch_tokens],
            [tokens, sums.batch_tokens, sums.tokens_tokens],
        ]
        targets = [sums.seconds, sums.batch_seconds, sums.tokens_seconds]
        values = [*targets, *itertools.chain(*products)]
        possible = all(math.isfinite(value) and value >= 0 for value in values)
        if not possible or not steps or not sums.seconds or max(values) > _MOST:
            return
        fade = 0.5 ** (steps / self._half_life_steps)
        for row, new in zip(self._products, products, strict=True):
            row[:] = [old * fade + value for old, value in zip(row, new, strict=True)]
        self._targets = [
            old * fade + value for old, value in zip(self._targets, targets, strict=True)
        ]
        self._model = None

    def _fit(self) -> StepModel:
        expected = sum(map(operator.mul, self._products[0], self._default))
        prior = [value * self._targets[0] / expected for value in self._default]
        if self.steps < MIN_STEPS:
            return StepModel(*prior)
        # In units of each column's own size, so that one ridge serves all three.
        scale = [math.sqrt(self._products[each][each]) or 1.0 for each in range(3)]
        products = [
            [self._products[i][j] / (scale[i] * scale[j]) + _RIDGE * (i == j) for j in range(3)]
            for i in range(3)
        ]
        targets = [self._targets[i] / scale[i] + _RIDGE * prior[i] * scale[i] for i in range(3)]
        best = [value / unit for value, unit in zip(_best(products, targets), scale, strict=True)]
        return StepModel(*best) if any(best) else StepModel(*prior)


def _best(products: list[list[float]], targets: list[float]) -> list[float]:
    """The x >= 0 with the least x^T P x - 2 t^T x; P is positive definite.

    If the least of all has no negative part it is the answer; else some are 0 there, and with
    three unknowns every choice of these can be tried.
    """
    best, best_cost = [0.0] * 3, 0.0
    for size in (3, 2, 1):
        for support in itertools.combinations(range(3), size):
            part = _solved([[products[i][j] for j in support] + [targets[i]] for i in support])
            cost = -sum(targets[i] * value for i, value in zip(support, part, strict=True))
            if min(part) < 0 or cost >= best_cost:
                continue
            best, best_cost = [0.0] * 3, cost
            for i, value in zip(support, part, strict=True):
                best[i] = value
        if size == 3 and any(best):
            break
    return best


def _solved(rows: list[list[float]]) -> list[float]:
    """The solution of linear equations, each row with its right side at its end."""
    count = len(rows)
    for i in range(count):  # positive definite: no pivots have to be chosen
        for k in range(i + 1, count):
            factor = rows[k][i] / rows[i][i]
            rows[k] = [low - factor * high for low, high in zip(rows[k], rows[i], strict=True)]
    solution = [0.0] * count
    for i in reversed(range(count)):
        rest = sum(rows[i][j] * solution[j] for j in range(i + 1, count))
        solution[i] = (rows[i][count] - rest) / rows[i][i]
    return solution
