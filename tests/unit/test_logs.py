"""Logs: one JSON object a line where nobody watches, with the cause in each."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import structlog

from kvfabric import logs
from kvfabric.errors import Refused


@pytest.fixture(autouse=True)
def own_configuration() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def test_lines_are_json_and_repeat_the_cause_inside_it(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    log = logs.logger(node="n0")

    with logs.cause("n0/1/7"):
        log.info("resync", why="gap")
    log.info("ready")

    inside, outside = (json.loads(line) for line in capfd.readouterr().err.splitlines())
    assert inside.pop("timestamp").endswith("Z")
    assert inside == {
        "event": "resync",
        "level": "info",
        "node": "n0",
        "why": "gap",
        "cause": "n0/1/7",
    }
    assert "cause" not in outside


def test_the_level_comes_from_the_environment(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(logs.LEVEL_VARIABLE, "warning")
    logs.configure()

    logs.logger().info("quiet")
    logs.logger().warning("loud")

    lines = capfd.readouterr().err.splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["loud"]


def test_a_level_that_does_not_exist_is_refused() -> None:
    with pytest.raises(Refused, match="take debug, info, warning or error"):
        logs.configure("chatty")
