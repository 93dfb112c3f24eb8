"""The namespace of a vLLM engine: model, weights, config, tokenizer, rotary and format.

vLLM's block hash covers tokens, cache salt and images, but neither the model nor the layout
of its KV: the fingerprint does.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfabric.errors import Refused
from kvfabric.keys import fingerprint_digest
from kvfabric.types import Fingerprint, Format, Namespace
from kvfabric_client.integrations.fingerprint import (
    WEIGHTS,
    settings_digest,
    tokenizer_digest,
    weights_revision,
)
from kvfabric_client.models import cache_folder

if TYPE_CHECKING:
    from vllm.config import VllmConfig

REMEDY = 'set "weights_revision" in kv_connector_extra_config to a digest or commit id'
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ROTARY = re.compile(r"rope|rotary|max_position")
_VOLATILE = ("_name_or_path", "transformers_version")


def namespace_of(config: VllmConfig, form: Format, tenant: str, weights: str | None) -> Namespace:
    """Refused where the weights' revision is unknown and not given."""
    model = config.model_config
    folder = model_folder(model.model, model.revision)
    settings = _settings(model.hf_config.to_dict())
    fingerprint = Fingerprint(
        model=_model_name(model.model, folder),
        weights_revision=weights or _weights_revision(config, folder),
        config=settings_digest(
            settings
            | {
                "compute dtype": str(model.dtype),
                "quantization": model.quantization,
                "block hash": config.cache_config.prefix_caching_hash_algo,
            }
        ),
        tokenizer=_tokenizer(model.tokenizer, model.tokenizer_revision),
        rotary=settings_digest({k: v for k, v in settings.items() if _ROTARY.search(k)}),
        format=form,
    )
    return Namespace(tenant, fingerprint_digest(fingerprint))


def model_folder(model: str, revision: str | None) -> Path | None:
    """Where the files of a local or already downloaded model lie, or None."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError):
        return None


def cached_weights_revision(folder: Path, cache: Path) -> str:
    """A commit id for a snapshot of the hub, else the digest of the weight files.

    The digest is kept in `cache` under the files' paths, sizes and times, so that an engine
    reads its weights for it only once; engines and ranks that start together wait for the
    first. Refused for a folder without weights.
    """
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        return folder.name
    state = settings_digest({"files": [_state(path) for path in _weight_files(folder)]})
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / f"{state}.json"
    with (cache / f"{state}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if kept.exists():
            return str(json.loads(kept.read_text())["weights_revision"])
        revision = weights_revision(folder)
        # Replaced whole: a process that is killed here leaves no half of it.
        fresh = kept.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({"folder": str(folder), "weights_revision": revision}))
        fresh.replace(kept)
    return revision


def _weights_revision(config: VllmConfig, folder: Path | None) -> str:
    model = config.model_config.model
    if config.load_config.load_format == "dummy":
        raise Refused(
            f"the weights of {model!r} are made up (load_format='dummy'), so their revision is "
            f"unknown and their KV cannot be shared; {REMEDY}"
        )
    if folder is None:
        raise Refused(
            f"the files of {model!r} are not on this machine, so their weights' revision is "
            f"unknown and their KV cannot be shared; give a local folder, or {REMEDY}"
        )
    try:
        return cached_weights_revision(folder, cache_folder() / "weights")
    except Refused as error:
        raise Refused(f"{error}; or {REMEDY}") from error


def _weight_files(folder: Path) -> list[Path]:
    return sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)})


def _state(path: Path) -> tuple[str, int, int, int]:
    state = path.stat()
    return str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _model_name(model: str, folder: Path | None) -> str:
    """Not the path: the same model may lie elsewhere on another machine."""
    if folder is not None and folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return Path(model).name if Path(model).is_dir() else model


def _tokenizer(tokenizer: str, revision: str | None) -> str:
    folder = model_folder(tokenizer, revision)
    return (tokenizer_digest(folder) if folder else "") or f"{tokenizer}@{revision}"


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _VOLATILE}
