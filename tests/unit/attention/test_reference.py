"""The reference kernel keeps the contract."""

from __future__ import annotations

from tests.unit.attention.kernel_contract import KernelContract

from kvfabric_nodes.attention.kernels import Kernel
from kvfabric_nodes.attention.kernels.reference import ReferenceKernel


class TestReference(KernelContract):
    def kernel(self) -> Kernel:
        return ReferenceKernel()
