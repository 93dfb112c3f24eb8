"""A vLLM engine in a process of its own. Run as a script with the engine's arguments in JSON.

One JSON request a line on stdin, one answer a line on what was stdout; logs go to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    from vllm import LLM, SamplingParams

    engine = LLM(**json.loads(sys.argv[1]))

    def answer(said: object) -> None:
        print(json.dumps(said), file=answers, flush=True)

    def generate(request: dict[str, Any]) -> list[dict[str, object]]:
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        if salt := request.get("salt"):
            prompts = [prompt | {"cache_salt": salt} for prompt in prompts]
        return [
            {
                "tokens": list(out.outputs[0].token_ids),
                "cached": out.num_cached_tokens,
                "transfer": out.kv_transfer_params,
                "finish": out.outputs[0].finish_reason,
                "others": [list(other.token_ids) for other in out.outputs[1:]],
            }
            for out in engine.generate(prompts, sampling(request), use_tqdm=False)
        ]

    def sampling(request: dict[str, Any]) -> SamplingParams:
        transfer = request.get("transfer")
        given = {
            "temperature": 0.0,
            "max_tokens": request["max_tokens"],
            "ignore_eos": True,
            "detokenize": False,
            "extra_args": {"kv_transfer_params": transfer} if transfer else None,
        }
        return SamplingParams(**(given | request.get("params", {})))

    def abort(request: dict[str, Any]) -> bool:
        """Computes so many steps of the prompts, and then no more; whether none had ended."""
        core = engine.llm_engine
        ids = [
            core.add_request(f"aborted {n}", {"prompt_token_ids": prompt}, sampling(request))
            for n, prompt in enumerate(request["prompts"])
        ]
        ended = [out for _ in range(request["abort"]) for out in core.step() if out.finished]
        core.abort_request(ids, internal=True)
        core.step()
        return not ended

    def preempted() -> int:
        return sum(m.value for m in engine.get_metrics() if m.name == "vllm:num_preemptions")

    def keys(prompt: list[int]) -> tuple[str, list[list[str]]]:
        """What the connector's scheduler side would look up for a prompt."""
        from vllm.v1.request import Request

        core = engine.llm_engine.engine_core.engine_core
        side = core.scheduler.connector._scheduler
        request = Request(
            "keys", prompt, SamplingParams(), None, block_hasher=core.request_block_hasher
        )
        parts = side._keys(side._track(request))
        side.finished(request)
        fingerprint = side._link._door.namespace.fingerprint
        return fingerprint.hex(), [[key.hex() for key in part] for part in parts]

    def digest() -> str:
        """Of the whole KV cache."""
        from blake3 import blake3
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        whole = blake3()
        for layer in get_kv_transfer_group()._worker._loader._memory._layers:
            whole.update(memoryview(layer).cast("B"))
        return whole.hexdigest()

    def loaded() -> int:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return int(get_kv_transfer_group()._worker._loader.counters.loaded)

    commands: dict[str, Callable[[dict[str, Any]], object]] = {
        "forget": lambda asked: engine.reset_prefix_cache(reset_connector=asked["connector"]),
        "abort": abort,
        "preempted": lambda _: preempted(),
        "loaded": lambda _: loaded(),
        "digest": lambda _: digest(),
        "keys": lambda asked: keys(asked["keys"]),
        "prompts": generate,
    }
    answer("ready")
    for line in sys.stdin:
        request = json.loads(line)
        answer(next(run for name, run in commands.items() if name in request)(request))
    engine.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
