"""How one layer of a block is attended: head counts, dimensions, and strides in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from kvfabric.errors import Refused
from kvfabric.types import Format

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
MAX_HEAD_DIM = 4096


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Where K and V of a token and head lie within one layer of a block, which begins at 0.

    A `plain` block has K then V, each [heads, block tokens, dim]. In one of MLA latents
    (DeepSeek-V2, absorbed form) a token has one vector for all query heads: all of it is the
    key, its first `value_dim` numbers are the value.
    """

    dtype: str
    block_tokens: int
    kv_heads: int
    key_dim: int
    value_dim: int
    value_offset: int  # of the first value behind the layer's begin
    key_head_stride: int
    value_head_stride: int
    key_token_stride: int
    value_token_stride: int
    layers: int
    layer_bytes: int

    @property
    def size_bytes(self) -> int:
        return self.layers * self.layer_bytes

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    def check_heads(self, query_heads: int) -> None:
        if query_heads <= 0 or query_heads % self.kv_heads:
            raise Refused(
                f"{query_heads} query heads over {self.kv_heads} KV heads: the first must be a "
                "multiple of the second"
            )


def attention_shape(form: Format, value_dim: int = 0) -> AttentionShape:
    """The shape of a format whose layers and heads are those of the blocks that are attended.

    `value_dim`: of MLA latents. Refused for what no kernel reads, with the name of it.
    """
    if form.packing != "plain":
        raise Refused(
            f"blocks packed as {form.packing!r} are not attended where they lie; append them as "
            "'plain': per layer K then V, each [heads, tokens, head dim]"
        )
    if form.dtype not in ITEM_BYTES:
        raise Refused(f"KV of {form.dtype!r} is not attended; {', '.join(ITEM_BYTES)} are")
    dims = (form.layers, form.kv_heads, form.head_dim, form.block_tokens)
    if min(dims) <= 0 or form.head_dim > MAX_HEAD_DIM:
        raise Refused(f"{form} has a dimension of 0, or a head above {MAX_HEAD_DIM}")
    latent = form.kind == "mla"
    if not latent and form.kind not in ("kv", "window"):
        raise Refused(f"blocks of kind {form.kind!r} have no keys and values to attend")
    if latent and (form.kv_heads != 1 or not 0 < value_dim <= form.head_dim):
        raise Refused(
            f"latents with {form.kv_heads} heads of {form.head_dim} and values of {value_dim}: "
            "there is one head, and value_dim says how many of its numbers are the value"
        )
    if not latent and value_dim not in (0, form.head_dim):
        raise Refused(f"values of {value_dim} beside keys of {form.head_dim}: only in MLA latents")
    token = form.head_dim * ITEM_BYTES[form.dtype]
    head = form.block_tokens * token
    plane = form.kv_heads * head
    return AttentionShape(
        dtype=form.dtype,
        block_tokens=form.block_tokens,
        kv_heads=form.kv_heads,
        key_dim=form.head_dim,
        value_dim=value_dim if latent else form.head_dim,
        value_offset=0 if latent else plane,
        key_head_stride=head,
        value_head_stride=head,
        key_token_stride=token,
        value_token_stride=token,
        layers=form.layers,
        layer_bytes=plane if latent else 2 * plane,
    )
