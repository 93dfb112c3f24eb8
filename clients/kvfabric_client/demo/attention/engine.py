"""`python -m kvfabric_client.demo.attention.engine SPEC`: an engine, driven by its standard input.

The model is transformers' own, called as its `generate` calls it.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import kvfabric_client
from kvfabric_client.demo.attention.memory import Growth
from kvfabric_client.demo.attention.protocol import (
    Order,
    Report,
    Spec,
    dump,
    load_order,
    load_spec,
)
from kvfabric_client.integrations.transformers import (
    FabricCache,
    fabric_attention,
    model_namespace,
)

TIMEOUT_S = 30.0  # room may have to be borrowed first


class Engine:
    """One context. What it needs of memory is measured from when another one, of a chunk, has come
    and gone: the model has been loaded and used then, and every connection made."""

    def __init__(self, spec: Spec, stack: ExitStack) -> None:
        self._chunk_tokens = spec.chunk_tokens
        self._model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32).eval()
        self._cache = self._fabric(spec, stack) if spec.home else DynamicCache()
        self._last = 0
        self._held_bytes = 0
        self._next([0] * spec.chunk_tokens)
        self._next([0])
        self._cache.reset()
        self._growth = Growth()

    def obey(self, order: Order) -> Report:
        tokens, seconds = [], []
        for step in range(order.decode):
            began_s = time.perf_counter()
            tokens.append(self._next(order.prompt if step == 0 and order.prompt else [self._last]))
            seconds.append(time.perf_counter() - began_s)
        return self.report(tokens, seconds)

    def report(self, tokens: list[int], seconds: list[float]) -> Report:
        fabric = isinstance(self._cache, FabricCache)
        totals = asdict(self._cache.totals) if fabric else {}
        return Report(tokens, seconds, self._growth.peak_bytes, self._held_bytes, totals)

    def _fabric(self, spec: Spec, stack: ExitStack) -> FabricCache:
        client = stack.enter_context(kvfabric_client.connect(spec.home, timeout_s=TIMEOUT_S))
        room = client.open(model_namespace(self._model, block_tokens=spec.block_tokens))
        return stack.enter_context(
            fabric_attention(self._model, room, block_tokens=spec.block_tokens)
        )

    def _next(self, tokens: list[int]) -> int:
        """The most likely token behind these."""
        for first in range(0, len(tokens), self._chunk_tokens):
            some = torch.tensor([tokens[first : first + self._chunk_tokens]])
            logits = self._model(some, past_key_values=self._cache, logits_to_keep=1).logits
            if isinstance(self._cache, FabricCache):
                self._held_bytes = max(self._held_bytes, self._cache.held_bytes)
        self._last = int(logits[0, -1].argmax())
        return self._last


@torch.no_grad()
def main(spec: Spec) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to the log
    with ExitStack() as stack:
        engine = Engine(spec, stack)
        answers.write(dump(engine.report([], [])) + "\n")
        for line in sys.stdin:
            answers.write(dump(engine.obey(load_order(line))) + "\n")


if __name__ == "__main__":
    main(load_spec(sys.argv[1]))
