"""What the demo says of what it found."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kvfabric.errors import Refused
from kvfabric_client.demo.result import Result, Round

ROUNDS = (
    Round(cold_s=10.0, warm_s=0.2, example_s=0.3, loaded_tokens=3968, equal=True),
    Round(cold_s=12.0, warm_s=0.3, example_s=0.5, loaded_tokens=3840, equal=True),
    Round(cold_s=11.0, warm_s=0.4, example_s=0.4, loaded_tokens=3968, equal=True),
)
RESULT = Result(
    engine="vllm",
    engine_version="0.32.0",
    model="a model",
    prompt_tokens=4000,
    greedy_tokens=32,
    rounds=ROUNDS,
    bytes_stored=600_000_000,
    bytes_moved=500_000_000,
    read_s=0.25,
    machine={"cores": 2},
)


def shown(result: Result) -> str:
    console = Console(width=120, file=io.StringIO())
    with console.capture() as captured:
        console.print(result.table())
    return captured.get()


def test_the_json_has_medians_the_worst_rounds_tokens_and_the_nodes_speed() -> None:
    said = json.loads(RESULT.to_json())

    assert (said["ttft_cold_s"], said["ttft_warm_s"], said["ttft_example_s"]) == (11.0, 0.3, 0.4)
    assert said["prompt_tokens"] == 4000
    assert said["loaded_tokens"] == 3840
    assert said["bytes_moved"] == 500_000_000
    assert said["gigabytes_per_s"] == 2.0
    assert said["tokens_equal"] is True
    assert (said["engine"], said["model"]) == ("vllm", "a model")
    assert len(said["rounds"]) == 3


def test_a_success_has_no_failure() -> None:
    assert RESULT.failure == ""


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (replace(ROUNDS[1], equal=False), "tokens differ"),
        (replace(ROUNDS[1], loaded_tokens=0), "loaded nothing"),
    ],
)
def test_one_bad_round_is_a_failure(changed: Round, text: str) -> None:
    assert text in replace(RESULT, rounds=(ROUNDS[0], changed, ROUNDS[2])).failure


def test_a_load_that_no_node_counted_is_a_failure() -> None:
    assert "no byte" in replace(RESULT, bytes_moved=0).failure


def test_the_table_marks_what_misses_its_target() -> None:
    assert " no " not in shown(RESULT)
    slow = tuple(replace(each, warm_s=2.0) for each in ROUNDS)
    lines = [line for line in shown(replace(RESULT, rounds=slow)).splitlines() if " no " in line]
    assert [line.split("│")[1].strip() for line in lines] == [
        "cold / warm",
        "warm, vLLM's ExampleConnector",
    ]


def test_without_vllm_nothing_is_said_of_its_connector() -> None:
    alone = replace(
        RESULT,
        engine="transformers",
        rounds=tuple(replace(each, example_s=None) for each in ROUNDS),
    )
    assert "ExampleConnector" not in shown(alone)
    assert json.loads(alone.to_json())["ttft_example_s"] is None


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(Refused, match=r"file/demo\.json"):
        RESULT.write_json(blocked / "demo.json")
