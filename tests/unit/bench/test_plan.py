"""What the data path's bench measures, and what it holds the figures against."""

from __future__ import annotations

import pytest

from kvfabric.errors import Refused
from kvfabric_client.bench.plan import MOVES, NAMES, Plan
from kvfabric_client.bench.report import AtLeast, AtMostOver, Target
from kvfabric_client.bench.targets import target_of

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@pytest.mark.parametrize(
    ("name", "size_bytes", "target"),
    [
        ("shm_put", 256 * KIB, None),
        ("shm_put", MIB, AtLeast(0.50)),
        ("shm_put_unchecked", MIB, AtLeast(0.80)),
        ("shm_put", 4 * MIB, AtLeast(0.55)),
        ("shm_put_unchecked", 4 * MIB, AtLeast(0.92)),
        ("shm_get", 256 * KIB, AtLeast(0.70)),
        ("shm_get_unchecked", 4 * MIB, AtLeast(0.85)),
        ("tcp_put", MIB, AtLeast(0.80)),
        ("tcp_get_unchecked", MIB, AtLeast(0.85)),
        ("shm_view", MIB, AtMostOver(40.0)),
        ("match_400", 4 * KIB, AtMostOver(250.0)),
        ("move_unthrottled", MIB, AtLeast(0.80)),
        ("readers_during_throttled_move", MIB, AtLeast(0.75)),
    ],
)
def test_every_figure_has_the_target_that_was_set(
    name: str, size_bytes: int, target: Target | None
) -> None:
    assert target_of(name, size_bytes) == target


def test_a_whole_run_tells_its_length_beforehand() -> None:
    assert Plan(rounds=5).steps == (3 * (len(NAMES) - 3) + 3) * 6
    assert Plan(names=MOVES, sizes=[MIB, 4 * MIB], rounds=5).steps == 2 * 6
    assert Plan(names=["match_400"], rounds=5).steps == 6
    assert Plan(names=["shm_view"], sizes=[MIB], rounds=5).steps == 6


@pytest.mark.parametrize(
    ("names", "sizes", "rounds", "memory_bytes", "said"),
    [
        (["shm_putt"], [MIB], 5, GIB, "no figure is called 'shm_putt'"),
        (["shm_put"], [], 5, GIB, "at least one size"),
        (["shm_put"], [0], 5, GIB, "above zero"),
        (["shm_put"], [MIB], 4, GIB, "at least 5"),
        (["shm_put"], [4 * MIB], 5, GIB - 1, "4 MiB need a node of at least 1 GiB"),
    ],
)
def test_a_plan_that_cannot_be_measured_is_refused(
    names: list[str], sizes: list[int], rounds: int, memory_bytes: int, said: str
) -> None:
    with pytest.raises(Refused, match=said):
        Plan(names, sizes, rounds, memory_bytes)
