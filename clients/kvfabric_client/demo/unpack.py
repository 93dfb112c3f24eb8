"""`python -m kvfabric_client.demo.unpack SOURCE FILE FOLDER`: GGUF weights as plain float32.

A process of its own, so that whoever wants the folder needs no torch.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def unpack(source: str, gguf_file: str, folder: str) -> None:
    """Writes weights, config and tokenizer of SOURCE/FILE to the folder."""
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=torch.float32,
        gguf_file=gguf_file,
        quantization_config=GgufConfig(gguf_file=gguf_file, dequantize=True),
    )
    # The weights are plain now; left in, this would have engines look for 4 bit ones.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(folder)


if __name__ == "__main__":
    unpack(*sys.argv[1:4])
