"""`kvfabric demo attention`, shorter: a real model, real nodes, one of which is drained."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.demos import demo

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]


def test_a_model_decodes_from_three_nodes_and_keeps_an_eighth_of_its_kv(tmp_path: Path) -> None:
    said, _ = demo("attention", tmp_path, 480, "--tokens", "3072", "--answer", "4")

    assert said["failure"] == ""
    assert said["tokens"] == said["plain_tokens"]
    assert len(said["tokens"]) >= 9
    assert 8 * said["peak_bytes"] <= said["kv_bytes"] < said["plain_peak_bytes"]
    assert 8 * said["held_bytes"] <= said["kv_bytes"]
    spread, draining, empty = said["phases"]
    assert set(spread["tokens"]) == {"home", "east", "west"}
    assert min(spread["tokens"].values()) > 0
    assert draining["seconds"], "nothing was decoded while the node was drained"
    assert not empty["tokens"].get("east")
    layers, before = said["shape"]["layers"], said["prompt_tokens"]
    for phase in said["phases"]:  # every earlier token by exactly one node, in each layer
        after = before + len(phase["seconds"])
        assert sum(phase["tokens"].values()) == layers * sum(range(before, after))
        assert phase["formula_bytes"] <= phase["wire_bytes"] <= 1.1 * phase["formula_bytes"]
        before = after
    assert said["holdings"]["east empty"]["east"]["held"] == 0
    assert said["recomputed"] == 0
