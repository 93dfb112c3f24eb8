"""Torch's flash attention for CPU; see `fused`. Loaded in the background when it is first asked."""

from __future__ import annotations

import functools
import importlib.util
import threading
from concurrent.futures import Future
from typing import Any

from kvfabric_nodes.attention.kernels import Work, memory
from kvfabric_nodes.attention.kernels.fused import FusedKernel

MANY_ROWS = 64  # of one KV head, with its group: from here on a kernel computes more than it reads


class TorchKernel(FusedKernel):
    """See `Kernel`. In bfloat16 and float16 weights and outputs are rounded to that.

    `only`: there is no better kernel here. Then its first use waits for torch; else it refuses
    while that is being loaded, where it would round, and where memory is what takes the time: to
    load torch costs a node seconds and 200 MB, and a kernel that reads in place is not beaten.
    """

    name = "torch"
    chunk_bytes = 2 << 20  # what a core's own cache has

    def __init__(self, threads: int, *, only: bool = False) -> None:
        self._threads = threads
        self._only = only
        if only and _installed():
            _loading()  # before the first call waits for it

    @property
    def torch(self) -> Any:
        import torch

        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        return torch

    def refuses(self, work: Work) -> str:
        if work.softcap:
            return "torch's op has no soft-cap"
        if not self._only and (reason := _why_others(work)):
            return reason
        if not _installed():
            return "torch is not installed"
        loading = _loading()
        if self._only or loading.done():
            return loading.result()
        return "torch is still being loaded"

    def over(
        self, address: int, kind: str, sizes: tuple[int, ...], strides: tuple[int, ...]
    ) -> Any:
        bits = memory.over(address, f"i{strides[-1]}", sizes, strides)
        return self.torch.from_numpy(bits).view(getattr(self.torch, kind))

    def fused(self, q: Any, k: Any, v: Any, mask: Any, scale: float) -> tuple[Any, Any]:
        op = "_scaled_dot_product_flash_attention_for_cpu"
        o, lse = getattr(self.torch.ops.aten, op)(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        return o, lse

    def placed(self, tensor: Any) -> Any:
        return tensor


def _why_others(work: Work) -> str:
    if work.query_dtype != "float32":
        return f"torch's op rounds weights and outputs to {work.query_dtype}"
    if work.rows * work.query_heads // work.shape.kv_heads < MANY_ROWS:
        return f"fewer than {MANY_ROWS} rows of a KV head are bound by memory"
    return ""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("torch") is not None


@functools.cache
def _loading() -> Future[str]:
    """Why it does not load; empty: it has loaded."""
    loaded: Future[str] = Future()
    thread = threading.Thread(
        target=lambda: loaded.set_result(_load()), name="kvfabric-torch", daemon=True
    )
    thread.start()
    return loaded


def _load() -> str:
    try:
        import torch  # noqa: F401
    except Exception as error:  # whatever a broken installation raises
        return f"torch does not load: {error}"
    return ""
