"""What a transformers model's KV depends on, and how it lies: fingerprint, format, namespace."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from blake3 import blake3
from transformers import PreTrainedModel

from kvfabric.errors import Refused
from kvfabric.keys import fingerprint_digest
from kvfabric.types import DEFAULT_TENANT, Fingerprint, Format, Namespace
from kvfabric_client.integrations.fingerprint import named_digest, settings_digest

BLOCK_TOKENS = 64

# What a config says of the files and of the run, not of the KV.
UNRELATED = ("_name_or_path", "transformers_version", "architectures", "use_cache", "torch_dtype")


def model_namespace(
    model: PreTrainedModel,
    *,
    block_tokens: int = BLOCK_TOKENS,
    tenant: str = DEFAULT_TENANT,
    salt: bytes = b"",
) -> Namespace:
    """The namespace of this model's KV, with the weights as they are in memory now."""
    form = model_format(model, block_tokens)
    return Namespace(tenant, fingerprint_digest(model_fingerprint(model, form)), salt)


def model_format(model: PreTrainedModel, block_tokens: int = BLOCK_TOKENS) -> Format:
    """The blocks of this model's KV. Refused where they hold nothing."""
    if block_tokens < 1:
        raise Refused(f"a block of {block_tokens} tokens holds nothing; give at least 1")
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return Format(
        dtype=str(model.dtype).removeprefix("torch."),
        block_tokens=block_tokens,
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def model_fingerprint(model: PreTrainedModel, form: Format) -> Fingerprint:
    """What this model's KV depends on; its weights revision is a digest of them in memory.

    Token ids, not text, are what keys are made of, so the tokenizer is left out.
    """
    config = {name: v for name, v in model.config.to_dict().items() if name not in UNRELATED}
    return Fingerprint(
        model=str(config["model_type"]),
        weights_revision=named_digest(
            (f"{name} {tensor.dtype} {list(tensor.shape)}", _digest(tensor))
            for name, tensor in tensors(model)
        ),
        config=settings_digest(config),
        tokenizer="",
        rotary=settings_digest({name: v for name, v in config.items() if name.startswith("rope")}),
        format=form,
    )


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights and buffers by name; tied ones once. The rotary frequencies are a buffer."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def version(tensor: torch.Tensor) -> tuple[int, int]:
    """Changes with every write in place, also without gradients, and with the memory itself."""
    if tensor.is_inference():  # has no counter: a model loaded in inference mode is not watched
        return tensor.data_ptr(), 0
    return tensor.data_ptr(), tensor._version  # noqa: SLF001  torch has no public name for it


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, not a copy of it."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _digest(tensor: torch.Tensor) -> bytes:
    raw = as_bytes(tensor.detach().cpu().contiguous())
    return blake3(raw, max_threads=blake3.AUTO).digest()
