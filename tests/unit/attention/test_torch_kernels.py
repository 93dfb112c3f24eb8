"""Torch's fused ops keep the contract, where torch is installed and, of CUDA, a device."""

from __future__ import annotations

import dataclasses

import pytest
from tests.unit.attention.kernel_contract import KernelContract
from tests.unit.attention.scattered import Case, scattered

from kvfabric_nodes.attention.kernels import Kernel
from kvfabric_nodes.attention.kernels.torch_cpu import TorchKernel

pytest.importorskip("torch")


class TestTorch(KernelContract):
    o_error = 2e-2  # of values up to 4 in bfloat16, whose weights and outputs keep 8 bits
    lse_error = 2e-4  # its exponential for these dtypes has 14 bits

    def kernel(self) -> Kernel:
        return TorchKernel(2, only=True)

    def test_float32_is_as_exact_as_the_others(self) -> None:
        self.o_error = self.lse_error = 2e-5
        pieces = tuple((i * 16, i * 16 + 16) for i in range(300))
        case = Case(dim=64, block_tokens=16, pieces=pieces, visible=4790, rows=7, kv_heads=4)
        self.compare(case)
        self.compare(dataclasses.replace(case, window=900, sinks=20))
        self.compare(dataclasses.replace(case, positions=tuple(range(4700, 4707))))

    def test_beside_an_exact_kernel_it_leaves_to_it_what_it_rounds(self) -> None:
        assert TorchKernel(2).refuses(scattered(Case(dtype="bfloat16")).work)
        widened = scattered(Case(dtype="bfloat16", query_dtype="float32"))
        assert not self.kernel().refuses(widened.work)
        self.o_error = self.lse_error = 2e-5
        self.compare(Case(dtype="bfloat16", query_dtype="float32"))

    def test_a_soft_cap_is_left_to_others(self) -> None:
        assert self.kernel().refuses(scattered(Case(softcap=2.0)).work)
