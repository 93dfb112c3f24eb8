"""An unchanged model decodes while the KV of its context lies on the fabric.

The cache knows which tokens a call of the model brings; what is attended and appended, layer by
layer, is the step's (`steps`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import DynamicCache, PreTrainedModel

from kvfabric.errors import Refused, Unsupported
from kvfabric_client.integrations.transformers import attention
from kvfabric_client.integrations.transformers.identity import BLOCK_TOKENS, model_format
from kvfabric_client.integrations.transformers.local import Tensor
from kvfabric_client.integrations.transformers.mending import Mender, Totals
from kvfabric_client.integrations.transformers.newest import Newest
from kvfabric_client.integrations.transformers.passing import PassingCache
from kvfabric_client.integrations.transformers.rows import Row, Share, new_tokens
from kvfabric_client.integrations.transformers.steps import Forward
from kvfabric_client.room import Room

# Of cache layers that see all tokens, or the last of them.
ATTENDED = ("DynamicLayer", "DynamicSlidingWindowLayer")


@contextmanager
def fabric_attention(
    model: PreTrainedModel,
    room: Room,
    *,
    block_tokens: int = BLOCK_TOKENS,
    local_tokens: int = 0,
) -> Iterator[FabricCache]:
    """Has `model` attend on the fabric: `with fabric_attention(model, room) as cache:
    model.generate(**inputs, past_key_values=cache)`.

    `room`: opened with `model_namespace(model, block_tokens=...)`. `local_tokens`: that many of
    the newest tokens stay in this process, and go to the fabric in whole blocks. Afterwards the
    model attends as before; the stored blocks stay as cache. Several caches of one model may be
    in use, one within the other. Unsupported for models that attend to anything but the keys and
    values of tokens, all of them or the last.
    """
    _check_attended(model)
    attention.register()
    before = model.config._attn_implementation  # noqa: SLF001  there is no public name for it
    with ExitStack() as stack:
        cache = FabricCache(model, room, block_tokens=block_tokens, local_tokens=local_tokens)
        stack.callback(cache.close)
        stack.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(attention.NAME)
        for hook in (
            model.register_forward_pre_hook(cache.before_call, with_kwargs=True),
            model.register_forward_hook(cache.after_call, with_kwargs=True, always_call=True),
        ):
            stack.callback(hook.remove)
        yield cache


class FabricCache(PassingCache):
    """Made by `fabric_attention`. A row of the batch is a sequence of the room, opened by the
    first call of the model. Not for use by several threads at once."""

    def __init__(
        self, model: PreTrainedModel, room: Room, *, block_tokens: int, local_tokens: int
    ) -> None:
        self._form = model_format(model, block_tokens)
        super().__init__(self._form.layers)
        self.rows: list[Row] = []
        self.totals = Totals()
        self._room = room
        self._mender = Mender(model, self.totals)
        self._newest = Newest(local_tokens, block_tokens)
        self._signature = inspect.signature(model.forward)
        self._step: Forward | None = None
        self._during = ExitStack()

    @property
    def held_bytes(self) -> int:
        """KV that is in this process now, between two calls of the model."""
        return self._newest.held_bytes + sum(row.held_bytes for row in self.rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest tokens of every row: -2 forgets two."""
        if tokens_to_remove > 0:
            raise Refused(f"crop({tokens_to_remove}): say how many tokens go, as a negative number")
        for row in self.rows:
            del row.token_ids[max(0, len(row.token_ids) + tokens_to_remove) :]
            row.sequence.truncate(min(row.sequence.length, len(row.token_ids)))
        self.columns = max(0, self.columns + tokens_to_remove)

    def reset(self) -> None:
        """As new."""
        self.close()
        self.columns = 0

    def close(self) -> None:
        """Ends its sequences; their sealed blocks stay as cache. Safe to repeat."""
        for row in self.rows:
            row.sequence.close()
        self.rows = []
        self._newest.clear()

    # Around each call of the model ------------------------------------------------------

    def before_call(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._mine(args, kwargs)
        if call is None:
            return
        if call.get("input_ids") is None or call.get("inputs_embeds") is not None:
            raise Refused("KV is stored under token ids; call the model with input_ids")
        shares = self._shares(
            call["input_ids"], call.get("attention_mask"), call.get("position_ids")
        )
        self._step = Forward(shares, self._mender, self._newest)
        self._during.enter_context(attention.under_way(self._step))

    def after_call(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """`output` None: it failed, and may be repeated."""
        call = self._mine(args, kwargs)
        step = self._step
        if call is None or step is None:
            return
        self._step = None
        self._during.close()
        if output is None:
            step.undo()
        else:
            self.columns += call["input_ids"].shape[1]

    def _mine(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """What the model was called with, if it was with this cache."""
        call = self._signature.bind_partial(*args, **kwargs).arguments
        return call if call.get("past_key_values") is self else None

    def _shares(
        self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None
    ) -> list[Share]:
        """What is new, by row. Rows are opened where there are none yet."""
        batch = len(input_ids)
        if self.rows and batch != len(self.rows):
            raise Refused(f"a batch of {batch} rows; this cache has {len(self.rows)}, make another")
        before = [len(row.token_ids) for row in self.rows] or [0] * batch
        brought = new_tokens(input_ids, mask, position_ids, before, self.columns)
        self.rows = self.rows or self._opened(batch)
        for row, ids in zip(self.rows, brought, strict=True):
            row.settle(ids)
        for row, ids in zip(self.rows, brought, strict=True):
            row.token_ids += ids
        shares = [
            Share(row, start, len(ids))
            for row, start, ids in zip(self.rows, before, brought, strict=True)
        ]
        return [share for share in shares if share.count]

    def _opened(self, batch: int) -> list[Row]:
        """A sequence for each row, or for none."""
        with ExitStack() as opening:
            sequences = [
                opening.enter_context(self._room.sequence(self._form)) for _ in range(batch)
            ]
            opening.pop_all()
        return [Row(index, sequence) for index, sequence in enumerate(sequences)]


def _check_attended(model: PreTrainedModel) -> None:
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    others = {type(layer).__name__ for layer in layers} - set(ATTENDED)
    if config is not model.config:
        others.add("inputs besides text")
    if getattr(config, "attention_chunk_size", None):
        others.add("chunked attention")
    if len(layers) != config.num_hidden_layers:
        others.add("layers that share their KV")
    if others:
        raise Unsupported(
            f"{model.config.model_type} has {', '.join(sorted(others))}; only attention to the "
            "keys and values of all tokens, or the last of them, is computed on the fabric"
        )
