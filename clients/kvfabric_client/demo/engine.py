"""`python -m kvfabric_client.demo.engine SPEC`: one engine process, driven over its standard input.

Whatever the engine prints goes to standard error, so that standard output carries answers only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Protocol

from kvfabric_client.demo.protocol import Answer, Ask, EngineSpec, Ready, dump, load_ask


class Engine(Protocol):
    """A serving engine in this process."""

    version: str

    def generate(self, ask: Ask) -> Answer:
        """Answers all prompts at once. Returns when its store has taken what it was given."""
        ...

    def close(self) -> None: ...


def start(spec: EngineSpec) -> Engine:
    """Loads the model. The engine's libraries are imported here, not before."""
    if spec.engine == "vllm":
        from kvfabric_client.demo.vllm_engine import VllmEngine

        return VllmEngine(spec)
    from kvfabric_client.demo.transformers_engine import TransformersEngine

    return TransformersEngine(spec)


def main(arguments: Sequence[str]) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = start(EngineSpec.from_json(arguments[0]))
    try:
        answers.write(dump(Ready(engine.version)))
        for line in sys.stdin:
            answers.write(dump(engine.generate(load_ask(line))))
    finally:
        engine.close()


if __name__ == "__main__":
    main(sys.argv[1:])
