"""Cache layers that keep nothing: what they are given is handed on to the attention function."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kvfabric.errors import Unsupported
from kvfabric_client.integrations.transformers.local import Tensor


class PassingLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """Its cache knows how much was seen."""

    def __init__(self, cache: PassingCache) -> None:
        super().__init__()
        self._cache = cache
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to initialize."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.columns

    def get_max_length(self) -> int:
        return -1  # none


class PassingCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """`columns`: tokens before the next step, padding included."""

    def __init__(self, layers: int, columns: int = 0) -> None:
        self.columns = columns
        super().__init__(layers=[PassingLayer(self) for _ in range(layers)])

    def reorder_cache(self, *_: Any) -> NoReturn:
        raise Unsupported("beams on the fabric; use num_beams=1, or fork sequences yourself")

    def batch_repeat_interleave(self, *_: Any) -> NoReturn:
        raise Unsupported("rows of a batch on the fabric are not repeated; repeat its inputs")

    def batch_select_indices(self, *_: Any) -> NoReturn:
        raise Unsupported("rows of a batch on the fabric stay to its end; use a batch of one")
