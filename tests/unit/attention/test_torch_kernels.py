"""Torch's fused ops keep the contract, where torch is installed and, of CUDA, a device."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from tests.unit.attention.kernel_contract import KernelContract
from tests.unit.attention.scattered import Case, scattered

from kvfabric.attention.merge import Partial
from kvfabric_nodes.attention.kernels import Kernel, Work
from kvfabric_nodes.attention.kernels.cuda import CudaKernel
from kvfabric_nodes.attention.kernels.memory import over
from kvfabric_nodes.attention.kernels.torch_cpu import TorchKernel

torch = pytest.importorskip("torch")


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

    def test_beside_another_kernel_it_leaves_to_it_what_memory_bounds(self) -> None:
        assert "memory" in TorchKernel(2).refuses(scattered(Case(rows=31)).work)
        assert "memory" not in TorchKernel(2).refuses(scattered(Case(rows=32)).work)

    def test_a_soft_cap_is_left_to_others(self) -> None:
        assert self.kernel().refuses(scattered(Case(softcap=2.0)).work)


class Uploaded(CudaKernel):
    """Brings a work's pieces to the device first; there they lie scattered as before."""

    def attend(self, work: Work) -> Partial:
        shape = work.shape
        keys = (shape.key_token_stride, shape.key_head_stride)
        values = (shape.value_token_stride, shape.value_head_stride)
        held = [
            self._upload(work, work.keys, shape.key_dim, *keys),
            self._upload(work, work.values, shape.value_dim, *values),
        ]
        places = [np.array([piece.data_ptr() for piece in pieces], np.int64) for pieces in held]
        return super().attend(dataclasses.replace(work, keys=places[0], values=places[1]))

    def _upload(self, work: Work, places: Any, dim: int, token: int, head: int) -> list[Any]:
        """Of each piece all bytes from its first number to its last."""
        rest = (work.shape.kv_heads - 1) * head + dim * work.shape.item_bytes
        return [
            torch.from_numpy(over(int(place), "u1", (rest + (int(n) - 1) * token,), (1,))).cuda()
            for place, n in zip(places, work.tokens, strict=True)
        ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
class TestCuda(KernelContract):
    o_error = 2e-2  # as TestTorch, and tf32 within float32
    lse_error = 2e-3

    def kernel(self) -> Kernel:
        return Uploaded()
