"""Torch's memory-efficient attention for CUDA, over KV in device memory; see `fused`.

No node chooses it yet: KV lies in main memory until there is a device tier. Its tests want a
device.
"""

from __future__ import annotations

from typing import Any

from kvfabric_nodes.attention.kernels import Work
from kvfabric_nodes.attention.kernels.fused import FusedKernel

ALIGNED = 8  # numbers: dimensions of heads, and rows of a mask, begin at multiples of it


class CudaKernel(FusedKernel):
    """See `Kernel`. A work's addresses are those of device memory."""

    name = "cuda"
    chunk_bytes = 64 << 20  # enough to keep a device busy

    def __init__(self, device: str = "cuda") -> None:
        self._device = device

    @property
    def torch(self) -> Any:
        import torch

        return torch

    def refuses(self, work: Work) -> str:
        if work.softcap:
            return "torch's op has no soft-cap"
        if work.shape.key_dim % ALIGNED:
            return f"torch's op takes heads of a multiple of {ALIGNED}"
        return ""

    def over(
        self, address: int, kind: str, sizes: tuple[int, ...], strides: tuple[int, ...]
    ) -> Any:
        memory = _DeviceMemory(address, strides[-1], sizes, strides)
        bits = self.torch.as_tensor(memory, device=self._device)
        return bits.view(getattr(self.torch, kind))

    def fused(self, q: Any, k: Any, v: Any, mask: Any, scale: float) -> tuple[Any, Any]:
        op = "_scaled_dot_product_efficient_attention"
        bias = None if mask is None else self._aligned(mask).expand(-1, q.shape[1], -1, -1)
        o, lse, *_ = getattr(self.torch.ops.aten, op)(q, k, v, bias, True, scale=scale)
        return o, lse[..., : q.shape[2]]  # the op rounds the rows up

    def _aligned(self, mask: Any) -> Any:
        """The same mask, whose rows begin where the op wants them."""
        tokens = mask.shape[-1]
        padded = mask.new_zeros((*mask.shape[:-1], -(-tokens // ALIGNED) * ALIGNED))
        padded[..., :tokens] = mask
        return padded[..., :tokens]

    def placed(self, tensor: Any) -> Any:
        return tensor.to(self._device)


class _DeviceMemory:
    """Memory of the device that is somebody else's, as CUDA's array interface tells of it."""

    def __init__(
        self, address: int, item_bytes: int, sizes: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        self.__cuda_array_interface__ = {
            "shape": sizes,
            "strides": strides,
            "typestr": f"<i{item_bytes}",
            "data": (address, False),
            "version": 3,
        }
