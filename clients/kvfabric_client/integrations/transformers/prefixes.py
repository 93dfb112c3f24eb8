"""Prefixes of a transformers `DynamicCache`, stored in the fabric and restored from it.

The model computes what is not restored. Whatever happens to the fabric, `store` and `restore`
return: with less stored, or nothing restored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvfabric.errors import FabricError, Refused, Unsupported
from kvfabric.keys import chain, fingerprint_digest, shard_key
from kvfabric.logs import guest_logger
from kvfabric.types import DEFAULT_TENANT, Format, Key, Namespace, Part, Status
from kvfabric_client import Client, Room
from kvfabric_client.integrations.transformers.identity import (
    BLOCK_TOKENS,
    as_bytes,
    model_fingerprint,
    model_format,
    tensors,
    version,
)

MAX_BATCH_BLOCKS = 64  # shards under way in one call
TIMEOUT_S = 5.0
HELD = (Status.OK, Status.EXISTS)

log = guest_logger(__name__)


class PrefixStore:
    """One model's prefixes: blocks of `block_tokens` tokens, batch size 1, full attention only.

    A shard is one block: layer-major, each layer's K and then V, each `[kv_heads, block_tokens,
    head_dim]`. The namespace carries a digest of the weights as they are in memory, taken anew
    once any of them was changed in place (writes through `.data`, and to a model that was loaded
    in inference mode, stay unseen: make a new store after them).
    Not for use by several threads at once. Unsupported for models with other than full attention.
    """

    def __init__(
        self,
        fabric: Client,
        model: PreTrainedModel,
        *,
        block_tokens: int = BLOCK_TOKENS,
        tenant: str = DEFAULT_TENANT,
        salt: bytes = b"",
        ttl_s: float = 0.0,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._fabric = fabric
        self._model = model
        self._block_tokens = block_tokens
        self._tenant = tenant
        self._salt = salt
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._room: Room | None = None
        self._versions: list[tuple[int, int]] = []
        self._refresh()

    def store(self, cache: DynamicCache, token_ids: Sequence[int]) -> int:
        """Stores the whole blocks of `token_ids`, whose KV the cache begins with.

        Returns how many leading tokens the fabric holds now; 0 where it cannot be reached.
        Safe to repeat. Refused where the cache holds fewer tokens, or more than one sequence.
        """
        self._refresh()
        blocks = len(token_ids) // self._format.block_tokens
        _check_holds(cache, blocks * self._format.block_tokens, self._format)
        if not blocks:
            return 0
        try:
            room = self._open()
            keys = self._keys(room, token_ids, blocks)
            held = end = room.match(keys).matched
            while held == end < blocks:
                end = min(blocks, held + MAX_BATCH_BLOCKS)
                held += self._put(room, cache, keys, held, end)
        except FabricError as error:
            log.warning("store_failed", error=str(error))
            return 0
        return held * self._format.block_tokens

    def restore(self, token_ids: Sequence[int]) -> tuple[DynamicCache, int]:
        """Returns a new cache with the longest stored prefix, and how many tokens that is.

        At least the last token is left to compute. The caller owns the cache. A fabric that
        fails or is slow means fewer tokens, or none.
        """
        self._refresh()
        blocks = (len(token_ids) - 1) // self._format.block_tokens
        cache = DynamicCache(config=self._model.config)
        if blocks <= 0:
            return cache, 0
        try:
            found = self._load(token_ids, blocks)
        except FabricError as error:
            log.warning("restore_failed", error=str(error))
            return cache, 0
        if len(found):
            _fill(cache, found.to(self._model.device))
        return cache, len(found) * self._format.block_tokens

    def _put(
        self, room: Room, cache: DynamicCache, keys: Sequence[Key], first: int, end: int
    ) -> int:
        """Puts blocks first..end; returns how many of them, from the first on, are held."""
        packed = _pack(cache, first, end, self._format)
        parents = [keys[index - 1] if index else Key(b"") for index in range(first, end)]
        statuses = room.put(
            keys[first:end],
            _rows(packed),
            parents=parents,
            layers=self._format.layers,
            ttl_s=self._ttl_s,
            timeout_s=self._timeout_s,
        )
        return _leading(statuses, HELD)

    def _load(self, token_ids: Sequence[int], blocks: int) -> torch.Tensor:
        """`[found blocks, layers, 2, kv_heads, block_tokens, head_dim]`, at most `blocks`."""
        room = self._open()
        keys = self._keys(room, token_ids, blocks)
        matched = room.match(keys).matched
        form = self._format
        shape = (matched, form.layers, 2, form.kv_heads, form.block_tokens, form.head_dim)
        packed = torch.empty(shape, dtype=getattr(torch, form.dtype))
        rows = _rows(packed)
        for first in range(0, matched, MAX_BATCH_BLOCKS):
            end = min(matched, first + MAX_BATCH_BLOCKS)
            statuses = room.get_into(keys[first:end], rows[first:end], timeout_s=self._timeout_s)
            got = _leading(statuses, (Status.OK,))
            if got < end - first:
                return packed[: first + got]
        return packed

    def _keys(self, room: Room, token_ids: Sequence[int], blocks: int) -> list[Key]:
        form = self._format
        size = form.block_tokens
        links = chain(token_ids[at : at + size] for at in range(0, blocks * size, size))
        return [
            shard_key(room.id, link, Part(index * size, size, 0, form.layers, 0, form.kv_heads))
            for index, link in enumerate(links)
        ]

    def _refresh(self) -> None:
        """Takes format and fingerprint anew where the weights are not what they were."""
        versions = [version(tensor) for _, tensor in tensors(self._model)]
        if versions == self._versions:
            return
        _check_full_attention(self._model)
        self._format = model_format(self._model, self._block_tokens)
        digest = fingerprint_digest(model_fingerprint(self._model, self._format))
        self._namespace = Namespace(self._tenant, digest, self._salt)
        self._room = None
        self._versions = versions

    def _open(self) -> Room:
        if self._room is None:
            self._room = self._fabric.open(self._namespace)
        return self._room


def _check_full_attention(model: PreTrainedModel) -> None:
    config = model.config.get_text_config(decoder=True)
    others = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - {
        DynamicLayer.__name__
    }
    if others:
        raise Unsupported(
            f"{config.model_type} has layers that keep other than the whole KV "
            f"({', '.join(sorted(others))}); only full attention is stored"
        )


def _rows(packed: torch.Tensor) -> list[memoryview]:
    return [as_bytes(block) for block in packed]


def _check_holds(cache: DynamicCache, tokens: int, form: Format) -> None:
    """Refused unless every layer holds one sequence of at least `tokens` in this format."""
    if len(cache.layers) != form.layers:
        raise Refused(f"the cache has {len(cache.layers)} layers, the model {form.layers}")
    for index, layer in enumerate(cache.layers):
        for tensor in (layer.keys, layer.values):
            shape = [] if tensor is None else list(tensor.shape)
            if (
                len(shape) != 4
                or shape[2] < tokens
                or shape != [1, form.kv_heads, shape[2], form.head_dim]
            ):
                raise Refused(
                    f"layer {index} of the cache is {shape}; to store {tokens} tokens it must be "
                    f"[1, {form.kv_heads}, at least {tokens}, {form.head_dim}]"
                )


def _pack(cache: DynamicCache, first: int, end: int, form: Format) -> torch.Tensor:
    """`[blocks, layers, 2, kv_heads, block_tokens, head_dim]` of blocks first..end."""
    size = form.block_tokens
    shape = (end - first, form.layers, 2, form.kv_heads, size, form.head_dim)
    packed = torch.empty(shape, dtype=getattr(torch, form.dtype))
    for index, layer in enumerate(cache.layers):
        for which, tensor in enumerate((layer.keys, layer.values)):
            tokens = tensor.detach()[0, :, first * size : end * size]
            blocks = tokens.unflatten(1, (end - first, size)).transpose(0, 1)
            packed[:, index, which].copy_(blocks)
    return packed


def _fill(cache: DynamicCache, packed: torch.Tensor) -> None:
    """The reverse of `_pack`, into an empty cache."""
    for index in range(packed.shape[1]):
        keys, values = (
            packed[:, index, which].transpose(0, 1).flatten(1, 2).unsqueeze(0) for which in (0, 1)
        )
        cache.update(keys, values, index)


def _leading(statuses: Sequence[Status], wanted: Sequence[Status]) -> int:
    """How many statuses, from the first on, are among those wanted."""
    return sum(1 for _ in takewhile(lambda status: status in wanted, statuses))
