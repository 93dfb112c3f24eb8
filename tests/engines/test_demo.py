"""The demo itself, small: a Ray with two nodes, real engine processes, a tiny random model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.timeout(400)]

DEMO_TIMEOUT_S = 360.0
IN_A_NETWORK_OF_ITS_OWN = 'ip link set lo up && exec "$0" -m kvfabric_client.cli.main demo "$@"'


def demo(model: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs `kvfabric demo` where there is nothing but loopback."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("needs root and unshare for a network namespace")
    arguments = ["--model", str(model), "--json", str(out / "demo.json"), *options]
    return subprocess.run(
        ["unshare", "-n", "sh", "-c", IN_A_NETWORK_OF_ITS_OWN, sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=DEMO_TIMEOUT_S,
        check=False,
    )


def result(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "demo.json").read_text())
    return found


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_what_the_first_engine_computed_the_second_one_loads(
    engine: str, tiny_model: Path, tmp_path: Path
) -> None:
    done = demo(tiny_model, tmp_path, "--engine", engine, "--tokens", "1000", "--runs", "1")

    assert done.returncode == 0, done.stdout + done.stderr
    said = result(tmp_path)
    assert said["engine"] == engine
    assert said["prompt_tokens"] == 1000
    assert said["loaded_tokens"] >= 896  # whole blocks: 128 tokens in vLLM, 64 in transformers
    assert said["tokens_equal"] is True
    assert said["greedy_tokens"] >= 32
    assert said["bytes_moved"] >= said["loaded_tokens"] * 4 * 2 * 2 * 32 * 4
    assert said["gigabytes_per_s"] > 0
    assert (said["ttft_example_s"] is None) == (engine == "transformers")
    assert "greedy tokens the same" in done.stdout
    assert not list(Path("/dev/shm").glob("kvfabric-demo-*"))


def test_an_engine_that_fails_ends_the_demo_with_its_log(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")

    done = demo(broken, tmp_path, "--engine", "transformers", "--tokens", "256", "--runs", "1")

    assert done.returncode == 1
    assert "the transformers engine ended" in done.stderr
    assert "safetensors" in done.stderr
    assert not (tmp_path / "demo.json").exists()
