"""The vLLM connector without an engine: whose KV is whose, what is refused, what is dropped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

Facts = dict[str, Any]
FACTS = Path(__file__).with_name("vllm_facts.py")


@pytest.fixture(scope="module")
def facts(tiny_model: Path, other_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    folder = tmp_path_factory.mktemp("facts")
    with (folder / "log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, FACTS, tiny_model, other_weights, folder],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder)},
            stdout=subprocess.PIPE,
            stderr=log,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, (folder / "log").read_text()[-3000:]
    said: Facts = json.loads(done.stdout)
    return said


def test_whatever_changes_kv_changes_the_fingerprint(facts: Facts) -> None:
    prints = facts["fingerprints"]
    assert prints.pop("again") == prints["same"]
    assert len(set(prints.values())) == len(prints) == 5


def test_a_packing_is_named_by_what_the_kernel_does(facts: Facts) -> None:
    for dtype, (name, k_transposed_v_plain) in facts["packings"].items():
        assert (name == "vllm-cpu-vec") == k_transposed_v_plain, (dtype, name)


def test_engines_that_keep_only_a_window_take_no_part(facts: Facts) -> None:
    assert facts["reasons"]["full"] == ""
    assert "sliding window" in facts["reasons"]["hybrid"]
    assert "sliding window" in facts["reasons"]["window"]


def test_a_refusal_says_what_to_set(facts: Facts) -> None:
    refusals = facts["refusals"]
    assert refusals["none"] == ""
    assert "set it to 'recompute'" in refusals["fail"]
    assert "hme" in refusals["unknown key"]
    assert 'set "weights_revision"' in refusals["dummy weights"]


def test_saves_are_dropped_rather_than_waited_for(facts: Facts) -> None:
    assert facts["dropped"] == [2, 5]
