"""transformers in this process, one prompt after the other, with kvfabric behind its cache."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

import kvfabric_client
from kvfabric.errors import Refused
from kvfabric_client.demo.protocol import Answer, Ask, EngineSpec, Generation
from kvfabric_client.integrations.transformers import PrefixStore


class TransformersEngine:
    """One causal language model in float32."""

    def __init__(self, spec: EngineSpec) -> None:
        if spec.store not in ("kvfabric", "none"):
            raise Refused(f"transformers has no store called {spec.store!r}")
        self.version = str(transformers.__version__)
        self._model = AutoModelForCausalLM.from_pretrained(Path(spec.model), dtype=torch.float32)
        self._model.eval()
        self._fabric = (
            kvfabric_client.connect(home=spec.place) if spec.store == "kvfabric" else None
        )
        self._store = PrefixStore(self._fabric, self._model) if self._fabric else None

    @torch.no_grad()
    def generate(self, ask: Ask) -> Answer:
        start = time.perf_counter()
        generations = [self._answer(prompt, ask.new_tokens) for prompt in ask.prompts]
        return Answer(generations, time.perf_counter() - start)

    def close(self) -> None:
        if self._fabric is not None:
            self._fabric.close()

    def _answer(self, prompt: list[int], new_tokens: int) -> Generation:
        start = time.perf_counter()
        cache, loaded = self._restore(prompt)
        tokens = [self._next(cache, prompt[loaded:])]
        ttft_s = time.perf_counter() - start
        if self._store is not None:
            self._store.store(cache, prompt)
        while len(tokens) < new_tokens:
            tokens.append(self._next(cache, tokens[-1:]))
        return Generation(ttft_s, loaded, tokens)

    def _restore(self, prompt: list[int]) -> tuple[DynamicCache, int]:
        if self._store is None:
            return DynamicCache(config=self._model.config), 0
        return self._store.restore(prompt)

    def _next(self, cache: DynamicCache, tokens: list[int]) -> int:
        """Appends the tokens to the cache; returns the most likely one after them."""
        logits = self._model(
            torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        return int(logits[0, -1].argmax())
