"""The one shape of every bench."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from kvfabric.errors import Refused
from kvfabric_client.bench.report import (
    AtLeast,
    AtMost,
    AtMostOver,
    Reaches,
    Report,
    Row,
    machine,
    size_text,
)

MIB = 1 << 20
PUT = Row("shm_put", MIB, 3.0, "GB/s", 6.0, AtLeast(0.5))
SLOW_PUT = Row("shm_put", MIB, 2.9, "GB/s", 6.0, AtLeast(0.5))
VIEW = Row("shm_view", MIB, 110.0, "us", 70.0, AtMostOver(40.0))
SLOW_VIEW = Row("shm_view", MIB, 110.5, "us", 70.0, AtMostOver(40.0))


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (PUT, True),
        (SLOW_PUT, False),
        (VIEW, True),
        (SLOW_VIEW, False),
        (Row("bytes", 0, 105.0, "B", 100.0, AtMost(1.05)), True),
        (Row("bytes", 0, 106.0, "B", 100.0, AtMost(1.05)), False),
        (Row("times", 0, 8.0, "x", 100.0, Reaches(8.0)), True),
        (Row("times", 0, 7.9, "x", 1.0, Reaches(8.0)), False),
    ],
)
def test_a_target_is_met_from_its_bound_on(row: Row, met: bool) -> None:
    assert row.met is met


def test_a_row_without_a_target_is_neither_met_nor_missed() -> None:
    assert Row("free", 0, 1.0, "s", 2.0).met is None


def test_the_json_has_the_shape_of_every_bench() -> None:
    report = Report("data path", [PUT, VIEW], {"cpu": "some"})
    assert json.loads(report.to_json()) == {
        "rows": [
            {
                "name": "shm_put",
                "size_bytes": MIB,
                "value": 3.0,
                "unit": "GB/s",
                "limit": 6.0,
                "ratio": 0.5,
            },
            {
                "name": "shm_view",
                "size_bytes": MIB,
                "value": 110.0,
                "unit": "us",
                "limit": 70.0,
                "ratio": 1.571429,
            },
        ],
        "machine": {"cpu": "some"},
    }


def test_the_table_shows_the_target_beside_the_ratio() -> None:
    out = io.StringIO()
    longest = Row("shm_get_unchecked", 256 << 10, 10.123, "GB/s", 10.123, AtLeast(0.85))
    rows = [PUT, SLOW_VIEW, longest]
    Console(file=out, width=80).print(Report("data path", rows, {}).table())
    put, view, wide = (line for line in out.getvalue().splitlines() if "shm_" in line)
    assert "1 MiB" in put
    assert ">= 0.50" in put
    assert "yes" in put
    assert "+40.5" in view
    assert "over <= 40" in view
    assert "no" in view
    assert " ".join(wide.split()).endswith("10.12 GB/s 10.12 1.00 >= 0.85 yes")
    assert "shm_get_unchecked" in wide


def test_what_was_skipped_is_told_with_its_reason() -> None:
    report = Report("data path", [PUT], {}, {"far": "network namespaces need root"})
    assert json.loads(report.to_json())["skipped"] == {"far": "network namespaces need root"}
    out = io.StringIO()
    Console(file=out, width=80).print(report.table())
    assert "no far: network namespaces need root" in " ".join(out.getvalue().split())


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(Refused, match="'shm_put' is 0"):
        Row("shm_put", MIB, 1.0, "GB/s", 0.0)


def test_the_machine_names_what_the_figures_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.cpu.x86_non_temporal_threshold=0x40000")
    facts = machine(["pytest", "no-such-distribution"])
    assert facts["glibc_tunables"] == "glibc.cpu.x86_non_temporal_threshold=0x40000"
    versions = facts["versions"]
    assert isinstance(versions, dict)
    assert versions["pytest"] == pytest.__version__
    assert "no-such-distribution" not in versions
    assert {"cpu", "cores", "memory_bytes", "kernel", "python"} < facts.keys()


def test_a_report_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(Refused, match="cannot write the report to"):
        Report("data path", [PUT], {}).write_json(blocker / "report.json")


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, ""), (100, "100 B"), (256 << 10, "256 KiB"), (4 << 20, "4 MiB"), (1 << 30, "1 GiB")],
)
def test_sizes_are_written_in_binary_units(size_bytes: int, text: str) -> None:
    assert size_text(size_bytes) == text
