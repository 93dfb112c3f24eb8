"""Whole runs under a workload: real cores, figures, the picture, and what the command says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from kvfabric.errors import Refused
from kvfabric.simulation import picture, report, trial
from kvfabric.simulation.nodes import factory
from kvfabric.simulation.parameters import MIXED, UNIFORM, Setup
from kvfabric.simulation.trial import Trial
from kvfabric_client.cli.main import app

SMALL = Setup(nodes=4, sequences=1000, seed=4, workload=MIXED)


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    """A small cluster, without lending and with it."""
    return [trial.run(replace(SMALL, lending=lending), factory()) for lending in (False, True)]


def test_lending_serves_more_of_a_mixed_workload_with_books_that_are_right(
    trials: list[Trial],
) -> None:
    without, lending = trials
    assert without.violations == lending.violations == []
    assert without.moved_bytes == without.lent_bytes == 0
    assert lending.lent_bytes > 0
    assert lending.moved_bytes > 0
    assert lending.tokens_per_s > 1.05 * without.tokens_per_s
    assert lending.waiting < without.waiting


def test_what_was_lent_for_requests_that_ended_is_gone(trials: list[Trial]) -> None:
    """They dropped their KV; none of it stays at creditors as cache."""
    assert trials[1].cached_bytes == 0


def test_a_seed_repeats_its_run(trials: list[Trial]) -> None:
    again = trial.run(replace(SMALL, lending=True), factory())
    assert again.digest == trials[1].digest
    assert again.tally == trials[1].tally


def test_equal_lengths_gain_nothing() -> None:
    setup = replace(SMALL, workload=UNIFORM)
    without, lending = (
        trial.run(replace(setup, lending=lends), factory()) for lends in (False, True)
    )
    gain = report.gains([without, lending])["uniform"]["tokens_per_s"]
    assert gain == pytest.approx(1.0, abs=report.MAX_DIFFERENCE)


def test_the_report_is_json_and_tells_what_it_stands_on(trials: list[Trial]) -> None:
    found = json.loads(json.dumps(report.report(SMALL, trials)))
    assert [run["lending"] for run in found["runs"]] == [False, True]
    assert found["gains"]["mixed"]["tokens_per_s"] > 1
    assert found["workloads"][0]["kinds"][1]["prompt"]["high"] == 300_000
    assert found["engine"]["layers"] == 80


def test_the_picture_shows_every_node_and_both_runs(trials: list[Trial], tmp_path: Path) -> None:
    path = tmp_path / "memory.png"
    picture.draw(trials, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        colours = {colour for _, colour in image.getcolors(maxcolors=1 << 24) or []}
    assert picture.colour(0.0) in colours
    assert len(colours) > 50


def test_a_picture_that_cannot_be_written_is_refused(trials: list[Trial], tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot write"):
        picture.draw(trials, tmp_path / "none" / "memory.png")


def test_colours_go_from_empty_to_full() -> None:
    assert picture.colour(-1) == picture.colour(0)
    assert picture.colour(2) == picture.colour(1)
    assert picture.colour(0.5) != picture.colour(0.8)


def test_the_command_writes_figures_and_a_picture(tmp_path: Path) -> None:
    figures, image = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--nodes", "2", "--sequences", "60", "--workload", "mixed", "--seed", "5"]
    ran = CliRunner().invoke(
        app, ["simulate", *options, "--json", str(figures), "--png", str(image)]
    )
    assert ran.exit_code == 0, ran.output
    assert "violated invariants: none" in ran.output
    assert json.loads(figures.read_text())["seed"] == 5
    assert image.stat().st_size > 1000


def test_the_command_searches_for_faults() -> None:
    ran = CliRunner().invoke(app, ["simulate", "--faults", "--seed", "3"])
    assert ran.exit_code == 0, ran.output
    assert "1 runs from seed 3 on, violated invariants: none" in ran.output
