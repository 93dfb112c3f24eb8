"""Engine processes that do not do what they should. The engine never gets as far as a model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvfabric_client.demo.process import EngineFailed, EngineProcess
from kvfabric_client.demo.protocol import EngineSpec


def spec(**changes: str) -> EngineSpec:
    fields = {"engine": "transformers", "model": "/no/model", "store": "none", "place": ""}
    return EngineSpec(**fields | changes, context_tokens=64)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_an_engine_that_does_not_start_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    with EngineProcess(spec(store="no such store"), log) as engine:
        with pytest.raises(EngineFailed, match="no such store") as failure:
            engine.ready(60.0)
        assert "exit status 1" in str(failure.value)
        with pytest.raises(EngineFailed):
            engine.generate([[1]], 1)
    assert gone(engine.pid)


def test_an_engine_is_gone_when_its_context_is_left_by_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        EngineProcess(spec(), tmp_path / "engine.log") as engine,
    ):
        raise ZeroDivisionError
    assert gone(engine.pid)
