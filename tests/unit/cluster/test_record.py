"""fabric.json: what is written is read again, and nonsense is said to be nonsense."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfabric.cluster import record
from kvfabric.cluster.plan import JoinPlan, LeavePlan, LocalPlan, Plan, from_json, to_json
from kvfabric.cluster.processes import Process
from kvfabric.cluster.record import Fabric
from kvfabric.errors import Broken

FABRIC = Fabric(
    manager="127.0.0.1:7400",
    ray="127.0.0.1:6379",
    mark="ab",
    scratch="/tmp/x",
    nodes=("n0", "n1"),
    processes=(Process(1, 2), Process(3, 4)),
)


def test_what_was_written_is_read_again_and_by_this_user_only(tmp_path: Path) -> None:
    record.write(tmp_path, FABRIC)

    assert record.read(tmp_path) == FABRIC
    assert record.path_of(tmp_path).stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["fabric.json"]


def test_without_a_file_there_is_no_fabric(tmp_path: Path) -> None:
    assert record.read(tmp_path) is None
    record.remove(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"manager": 1}', "\xff"])
def test_nonsense_is_refused_with_the_remedy(tmp_path: Path, text: str) -> None:
    record.path_of(tmp_path).write_text(text, encoding="latin-1")

    with pytest.raises(Broken, match="remove the file"):
        record.read(tmp_path)


@pytest.mark.parametrize(
    "plan",
    [
        LocalPlan("/run/x", "ab", "/tmp/y", 2, 1 << 30, 0, attached=True),
        JoinPlan("/run/x", "10.0.0.1:6379", 0, 1 << 30, 7400),
        LeavePlan("10.0.0.1:6379"),
    ],
)
def test_the_launcher_gets_the_plan_that_was_made(plan: Plan) -> None:
    assert from_json(to_json(plan)) == plan
