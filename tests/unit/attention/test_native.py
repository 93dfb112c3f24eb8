"""The C kernel, at every level that this CPU has, with one thread and with several."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tests.unit.attention.kernel_contract import DTYPES, KernelContract
from tests.unit.attention.scattered import Case, scattered

from kvfabric.attention.floats import STORED, narrowed
from kvfabric_nodes.attention.kernels import Kernel
from kvfabric_nodes.attention.kernels.native import LEVELS, NativeKernel, available, levels


def test_the_build_has_made_the_library() -> None:
    assert available(), "make setup builds it, or: python hatch_build.py"
    assert levels()[0] == "base"


class LevelContract(KernelContract):
    level: str

    def kernel(self) -> Kernel:
        if self.level not in levels():
            pytest.skip(f"this CPU has no {self.level}")
        return NativeKernel(threads=2, level=self.level)


class TestBase(LevelContract):
    level = "base"


class TestAvx2(LevelContract):
    level = "avx2"


class TestAvx512(LevelContract):
    level = "avx512"


class TestAmx(LevelContract):
    level = "amx"


@pytest.mark.exhaustive
class TestBest(KernelContract):
    def kernel(self) -> Kernel:
        return NativeKernel(threads=3)


# Row 0 sees the first 20 of 64 tokens, row 1 all of them, and so on.
HALF_SEEN = Case(
    3,
    kv_heads=2,
    dim=40,
    block_tokens=64,
    pieces=((0, 64),),
    rows=12,
    positions=(19, 63) * 6,
    visible=64,
)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plane", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_none_reaches_only_the_rows_that_see_it(
    level: str, dtype: str, plane: int, bad: float
) -> None:
    if level not in levels():
        pytest.skip(f"this CPU has no {level}")
    made = scattered(dataclasses.replace(HALF_SEEN, dtype=dtype))
    block = made.memory[0].array.view(STORED[dtype]).reshape(2, 2, 64, 40)
    block[plane, :, 30, :] = narrowed(np.array(bad, np.float32), dtype)

    part = NativeKernel(threads=1, level=level).attend(made.work)

    assert np.abs(part.o[::2] - made.expected.o[::2]).max() < 2e-5
    assert np.abs(part.lse[::2] - made.expected.lse[::2]).max() < 2e-5
    assert np.isnan(part.lse[1::2]).any() if plane == 0 else not np.isfinite(part.o[1::2]).any()


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads_share_one_head_and_few_pieces(threads: int) -> None:
    pieces = tuple((i * 2048, i * 2048 + 2048) for i in range(5))  # of 512 KiB
    case = Case(4, "bfloat16", kv_heads=1, dim=64, block_tokens=2048, pieces=pieces, visible=10240)
    made = scattered(case)
    part = NativeKernel(threads=threads).attend(made.work)
    assert np.abs(part.o - made.expected.o).max() < 2e-5
    assert np.abs(part.lse - made.expected.lse).max() < 2e-5
