"""What the demo and its engine processes say to each other: one JSON object a line.

The first line that an engine process writes is `Ready`; then each line it reads is `Ask`, and
each line it writes the `Answer` to that. The end of its input ends it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

ENGINES = ("vllm", "transformers")


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Which engine, over which model, with which store behind its KV.

    `store` is "kvfabric" (`place` is the home node's address), "example" (vLLM's own
    ExampleConnector; `place` is its folder) or "none". `context_tokens` bounds prompt and
    answer of one request together.
    """

    engine: str
    model: str
    store: str
    place: str
    context_tokens: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> EngineSpec:
        return EngineSpec(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine is up; `version` is its distribution's."""

    version: str


@dataclass(frozen=True, slots=True)
class Ask:
    """Answer these prompts (token ids), all at once, with exactly `new_tokens` greedy tokens."""

    prompts: list[list[int]]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Generation:
    """One prompt's answer.

    `ttft_s` is the time from handing in the request to its first token; `loaded_tokens` how
    many of the prompt's tokens the engine did not compute but took from its store.
    """

    ttft_s: float
    loaded_tokens: int
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Answer:
    """`elapsed_s` covers all prompts, from the first handed in to the last token."""

    generations: list[Generation]
    elapsed_s: float


def dump(message: Ready | Ask | Answer) -> str:
    """One line, its end included."""
    return json.dumps(asdict(message)) + "\n"


def load_ready(line: str) -> Ready:
    return Ready(**json.loads(line))


def load_ask(line: str) -> Ask:
    return Ask(**json.loads(line))


def load_answer(line: str) -> Answer:
    raw = json.loads(line)
    return Answer([Generation(**each) for each in raw["generations"]], raw["elapsed_s"])
