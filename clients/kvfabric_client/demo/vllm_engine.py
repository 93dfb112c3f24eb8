"""vLLM in this process, with kvfabric, vLLM's own ExampleConnector, or nothing behind its KV."""

from __future__ import annotations

import time

import vllm
from vllm import LLM, SamplingParams

from kvfabric.errors import Refused
from kvfabric_client.demo.protocol import Answer, Ask, EngineSpec, Generation

SETTLE_TIMEOUT_S = 30.0
SETTLE_PAUSE_S = 0.001


class VllmEngine:
    """One `LLM` in float32, in which alone loaded and computed KV give the same tokens."""

    def __init__(self, spec: EngineSpec) -> None:
        self.version = str(vllm.__version__)
        self._llm = LLM(
            spec.model,
            dtype="float32",
            enforce_eager=True,
            max_model_len=spec.context_tokens,
            # A prompt in one step: ExampleConnector stores no more than a prompt's first step.
            max_num_batched_tokens=spec.context_tokens,
            kv_transfer_config=_transfer(spec),
        )
        self._engine = self._llm.llm_engine
        self._asked = 0

    def generate(self, ask: Ask) -> Answer:
        start = time.perf_counter()
        ids = [self._add(prompt, ask.new_tokens) for prompt in ask.prompts]
        first: dict[str, float] = {}
        last = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.outputs[0].token_ids:
                    first.setdefault(output.request_id, time.perf_counter() - start)
                last[output.request_id] = output
        elapsed_s = time.perf_counter() - start
        self._settle()
        generations = [
            Generation(first[i], last[i].num_cached_tokens or 0, list(last[i].outputs[0].token_ids))
            for i in ids
        ]
        return Answer(generations, elapsed_s)

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _add(self, prompt: list[int], new_tokens: int) -> str:
        self._asked += 1
        request = str(self._asked)
        sampling = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        self._engine.add_request(request, {"prompt_token_ids": prompt}, sampling)
        return request

    def _settle(self) -> None:
        """Steps on until the connector has let go of the requests that it is still saving."""
        scheduler = self._engine.engine_core.engine_core.scheduler
        end = time.monotonic() + SETTLE_TIMEOUT_S
        while scheduler.has_requests() and time.monotonic() < end:
            self._engine.step()
            time.sleep(SETTLE_PAUSE_S)


def _transfer(spec: EngineSpec) -> dict[str, object] | None:
    if spec.store == "none":
        return None
    common = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    if spec.store == "example":
        extra = {"shared_storage_path": spec.place}
        return {"kv_connector": "ExampleConnector", "kv_connector_extra_config": extra, **common}
    if spec.store == "kvfabric":
        return {
            "kv_connector": "KVFabricConnector",
            "kv_connector_module_path": "kvfabric_client.integrations.vllm",
            "kv_connector_extra_config": {"home": spec.place},
            **common,
        }
    raise Refused(f"no such store behind an engine: {spec.store!r}")
