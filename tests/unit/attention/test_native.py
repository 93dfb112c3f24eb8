"""The C kernel, at every level that this CPU has, with one thread and with several."""

from __future__ import annotations

import numpy as np
import pytest
from tests.unit.attention.kernel_contract import KernelContract
from tests.unit.attention.scattered import Case, scattered

from kvfabric_nodes.attention.kernels import Kernel
from kvfabric_nodes.attention.kernels.native import NativeKernel, available, levels


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


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads_share_one_head_and_few_pieces(threads: int) -> None:
    pieces = tuple((i * 2048, i * 2048 + 2048) for i in range(5))  # of 512 KiB
    case = Case(4, "bfloat16", kv_heads=1, dim=64, block_tokens=2048, pieces=pieces, visible=10240)
    made = scattered(case)
    part = NativeKernel(threads=threads).attend(made.work)
    assert np.abs(part.o - made.expected.o).max() < 2e-5
    assert np.abs(part.lse - made.expected.lse).max() < 2e-5
