"""What makes one model's KV another's, taken from its files or from its tensors.

Knows no engine. An engine's integration says what else its KV depends on (its config, its
packing) and builds the `kvfabric.types.Fingerprint` from both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from blake3 import blake3

from kvfabric.errors import Refused

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


def weights_revision(folder: Path) -> str:
    """A digest over names and contents of the model's weight files, in hex.

    Refused where there are none: such weights are unknown, and their KV is not shared.
    """
    revision = files_digest(folder, WEIGHTS)
    if not revision:
        raise Refused(
            f"no weights in {folder} (looked for {', '.join(WEIGHTS)}), so their revision is "
            "unknown and their KV cannot be shared; give the model as a local folder"
        )
    return revision


def tokenizer_digest(folder: Path) -> str:
    """A digest over the tokenizer's files, in hex; empty where the folder has none."""
    return files_digest(folder, TOKENIZER)


def files_digest(folder: Path, patterns: Iterable[str]) -> str:
    """A digest over names and contents of the files that match; empty where none do."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    if not found:
        return ""
    return named_digest((path.name, file_digest(path)) for path in sorted(found))


def file_digest(path: Path) -> bytes:
    """BLAKE3 of the content, on all cores: about half a second for a cold gigabyte."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).digest()


def named_digest(parts: Iterable[tuple[str, bytes]]) -> str:
    """A digest over (name, digest) pairs in the order given, in hex."""
    whole = blake3()
    for name, digest in parts:
        whole.update(len(name.encode()).to_bytes(4, "little") + name.encode() + digest)
    return whole.hexdigest()


def settings_digest(settings: Mapping[str, object]) -> str:
    """A digest of values that JSON can say (others by their text), whatever their order."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return blake3(text.encode()).hexdigest()
