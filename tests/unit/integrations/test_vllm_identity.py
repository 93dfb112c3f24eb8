"""The revision of a model's weights: read once, and again when a file has changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvfabric.errors import Refused
from kvfabric_client.integrations._vllm_identity import cached_weights_revision
from kvfabric_client.integrations.fingerprint import weights_revision


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_the_digest_is_kept_for_the_next_engine(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = cached_weights_revision(model, cache)
    assert first == weights_revision(model)
    (kept,) = cache.glob("*.json")
    kept.write_text('{"weights_revision": "as kept"}')
    assert cached_weights_revision(model, cache) == "as kept"


def test_weights_changed_in_place_have_another_revision(model: Path, tmp_path: Path) -> None:
    """Also where their size and their time of modification are as before."""
    cache, weights = tmp_path / "cache", model / "model.safetensors"
    before, state = cached_weights_revision(model, cache), weights.stat()
    weights.write_bytes(b"Weights")
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert cached_weights_revision(model, cache) != before


def test_a_snapshot_of_the_hub_is_its_commit(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / ("0a" * 20)
    folder.mkdir(parents=True)
    assert cached_weights_revision(folder, tmp_path / "cache") == "0a" * 20


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no weights in"):
        cached_weights_revision(tmp_path, tmp_path / "cache")
