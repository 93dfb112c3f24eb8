"""What the bench of attention measures, and what it holds the figures against."""

from __future__ import annotations

import pytest

from kvfabric.attention.shape import attention_shape
from kvfabric.errors import Refused
from kvfabric_client.bench.attention.estimates import crossover, expected_ratio
from kvfabric_client.bench.attention.plan import FETCH_LIMITED, KERNELS, NAMES, Plan, target_of
from kvfabric_client.bench.attention.shapes import MAIN, MAIN_FP32, SHAPES, SHARD_BYTES, Shape
from kvfabric_client.bench.report import AtLeast, AtMost, Reaches, Target

MIB = 1 << 20


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("kernel_bf16_d128_g4_16k", AtLeast(0.50)),
        ("kernel_bf16_d128_g4_128k", AtLeast(0.50)),
        ("kernel_bf16_d64_g3_16k", AtLeast(0.40)),
        ("kernel_bf16_d128_g8_128k", AtLeast(0.40)),
        ("kernel_fp32_d128_g4_16k", AtLeast(0.70)),
        ("kernel_fp32_d64_g8_128k", AtLeast(0.55)),
        ("kernel_fp16_d128_g4_16k", AtLeast(0.50)),
        ("remote_added_16k", AtMost(1.0)),
        ("remote_total_16k", AtMost(1.1)),
        ("attend_over_fetch_16k", AtLeast(0.9)),
        ("attend_over_fetch_16k_10gbit", Reaches(8.0)),
        ("crossover", None),
        ("stacked_16x8k_bf16", AtLeast(4.0)),
        ("stacked_16x8k_fp32", AtLeast(1.8)),
        ("wire_bytes", AtMost(1.05)),
    ],
)
def test_every_figure_has_the_target_that_was_set(name: str, target: Target | None) -> None:
    assert name in NAMES
    assert target_of(name) == target


def test_stacking_in_bfloat16_has_a_target_only_where_there_are_tiles() -> None:
    assert target_of("stacked_16x8k_bf16", amx=False) is None
    assert target_of("stacked_16x8k_fp32", amx=False) == AtLeast(1.8)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.text)
def test_the_shards_are_whole_layers_of_every_shape(shape: Shape) -> None:
    assert attention_shape(shape.format()).size_bytes == SHARD_BYTES


def test_the_bytes_of_a_step_are_those_of_the_formula() -> None:
    sent, back, new = 32 * 128 * 2, 32 * 128 * 4 + 32 * 4, 2 * 8 * 128 * 2
    assert MAIN.moved_bytes(parts=3) == 3 * (sent + back) + new
    assert MAIN_FP32.moved_bytes(parts=1, rows=2) == 2 * (2 * sent + back + 2 * new)


def test_a_whole_run_tells_its_length_beforehand() -> None:
    assert Plan(rounds=5).steps == len(NAMES) * 6
    assert Plan(names=FETCH_LIMITED, rounds=5).steps == 2 * 6


def test_it_attends_as_much_memory_as_it_is_told_unless_a_context_does_not_fit() -> None:
    assert Plan(memory_bytes=1536 * MIB).shards == 1536
    short = [name for name in KERNELS if name.endswith("_16k")]
    assert Plan(names=short, memory_bytes=128 * MIB).longest == 16384
    with pytest.raises(Refused, match="131072 tokens needs 1 GiB"):
        Plan(memory_bytes=1023 * MIB)


@pytest.mark.parametrize(
    ("names", "rounds", "said"),
    [(["kernel"], 5, "no figure is called 'kernel'"), (["crossover"], 4, "at least 5")],
)
def test_a_plan_that_cannot_be_measured_is_refused(
    names: list[str], rounds: int, said: str
) -> None:
    with pytest.raises(Refused, match=said):
        Plan(names, rounds)


def test_the_ratio_to_expect_has_the_round_trips_on_both_sides() -> None:
    assert expected_ratio(fetch_s=0.9, kernel_s=0.08, round_trip_s=0.01, calls=2) == pytest.approx(
        10.0
    )


@pytest.mark.parametrize(
    ("fetch_s", "tokens"),
    [
        ([2, 3, 4], 128.0),  # faster from the first on
        ([0, 3, 4], 170.667),
        ([0, 1, 4], 256.0),
        ([2, 0, 4], 320.0),  # what counts is from where on it stays faster
        ([0, 0, 0], 512.0),
    ],
)
def test_attending_far_away_is_faster_from_where_the_lines_cross(
    fetch_s: list[float], tokens: float
) -> None:
    assert crossover([128, 256, 512], fetch_s, [1, 1, 1]) == pytest.approx(tokens, abs=0.01)
