"""The choice of kernels by their measured speed, with the time in hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
from tests.unit.attention.scattered import Case, scattered

from kvfabric.attention.merge import Partial
from kvfabric_nodes.attention.kernels import Work
from kvfabric_nodes.attention.kernels.choice import CLASSES, LOOK_AGAIN, TRIES, Choice, Kernels

TIME = [0.0]


class Timed:
    """Takes a time of its own, on the test's clock."""

    def __init__(self, name: str, seconds: float, most_rows: int = 1000) -> None:
        self.name = name
        self.seconds = seconds
        self.most_rows = most_rows

    def refuses(self, work: Work) -> str:
        return "too many rows" if work.rows > self.most_rows else ""

    def attend(self, work: Work) -> Partial:
        TIME[0] += self.seconds
        return Partial(
            np.zeros((work.rows, work.query_heads, work.shape.value_dim), np.float32),
            np.zeros((work.rows, work.query_heads), np.float32),
        )


def kernels(*timed: Timed) -> Kernels:
    return Kernels(timed, Timed("last", 1.0), lambda: TIME[0])


def test_the_fastest_is_kept_once_all_were_tried() -> None:
    slow, fast = Timed("slow", 0.2), Timed("fast", 0.1)
    node, work = kernels(slow, fast), scattered(Case()).work
    ran = [node.attend(work).kernel for _ in range(2 * (TRIES + 1) + 50)]
    assert Counter(ran[: 2 * (TRIES + 1)]) == {"slow": TRIES + 1, "fast": TRIES + 1}
    assert set(ran[2 * (TRIES + 1) :]) == {"fast"}


def test_a_first_run_that_loads_and_warms_up_is_not_held_against_a_kernel() -> None:
    node, work = kernels(first := Timed("first", 9.0), Timed("second", 0.2)), scattered(Case()).work
    node.attend(work)
    first.seconds = 0.1
    ran = [node.attend(work).kernel for _ in range(40)]
    assert ran[-1] == "first"


def test_what_has_become_faster_is_found_again() -> None:
    slow, fast = Timed("slow", 0.4), Timed("fast", 0.1)
    node, work = kernels(slow, fast), scattered(Case()).work
    ran = Counter(node.attend(work).kernel for _ in range(4 * LOOK_AGAIN))
    assert ran["slow"] == TRIES + 1
    slow.seconds = 0.05
    ran = Counter(node.attend(work).kernel for _ in range(LOOK_AGAIN))
    assert ran["slow"] > LOOK_AGAIN / 2


def test_each_class_of_works_has_its_own_and_a_refusal_is_respected() -> None:
    node = kernels(Timed("few", 0.1, most_rows=1), Timed("many", 0.2, most_rows=8))
    one, some, more = (scattered(Case(rows=rows)).work for rows in (1, 8, 9))
    for _ in range(20):
        few, many = node.attend(one), node.attend(some)
    assert (few.kernel, many.kernel) == ("few", "many")
    assert np.isclose([few.seconds, many.seconds], [0.1, 0.2]).all()
    assert node.attend(more).kernel == "last"


def test_what_is_remembered_is_bounded() -> None:
    choice = Choice()
    for kind in range(CLASSES + 10):
        choice.note(kind, choice.pick(kind, ["a"]), 1.0)
    assert len(choice._classes) == CLASSES


def test_all_are_tried_in_turns() -> None:
    node, work = kernels(Timed("a", 0.1), Timed("b", 0.2)), scattered(Case()).work
    assert [node.attend(work).kernel for _ in range(4)] == ["a", "b", "a", "b"]
