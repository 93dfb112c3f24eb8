"""The kernels for KV in main memory."""

from __future__ import annotations

from kvfabric_nodes.attention.kernels import Kernel, native
from kvfabric_nodes.attention.kernels.choice import Kernels
from kvfabric_nodes.attention.kernels.native import NativeKernel
from kvfabric_nodes.attention.kernels.reference import ReferenceKernel
from kvfabric_nodes.attention.kernels.torch_cpu import TorchKernel


def cpu_kernels(threads: int) -> Kernels:
    """What is installed here. The reference serves where nothing else does."""
    has_native = native.available()
    measured: list[Kernel] = [NativeKernel(threads)] if has_native else []
    return Kernels([*measured, TorchKernel(threads, only=not has_native)], ReferenceKernel())
