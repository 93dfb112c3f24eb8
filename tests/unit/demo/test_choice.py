"""Which engine the demo takes, and what it says where vLLM cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfabric.errors import Unsupported
from kvfabric_client.demo import choice
from kvfabric_client.demo.choice import Choice, choose

OLD = "processor : 0\nflags : fpu sse2 avx\n"


@pytest.fixture
def old_processor(tmp_path: Path) -> Path:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(OLD)
    return cpuinfo


def test_without_avx2_the_same_is_done_with_transformers(
    old_processor: Path, tmp_path: Path
) -> None:
    found = choose("auto", tmp_path / "log", old_processor)

    assert found.engine == "transformers"
    assert "AVX2" in found.reason


def test_asking_for_vllm_where_it_cannot_run_is_unsupported(
    old_processor: Path, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=r"AVX2.*--engine transformers"):
        choose("vllm", tmp_path / "log", old_processor)


def test_transformers_is_taken_without_trying_vllm(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert choose("transformers", log) == Choice("transformers")
    assert not log.exists()


def test_a_vllm_that_does_not_import_is_named_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "PROBE", "raise ImportError('libnuma.so.1 is missing')")

    found = choose("auto", tmp_path / "log", tmp_path / "none")

    assert found.engine == "transformers"
    assert "libnuma.so.1 is missing" in found.reason
