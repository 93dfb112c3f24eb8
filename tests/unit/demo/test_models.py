"""The packaged model's folder, and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from kvfabric.errors import Refused
from kvfabric_client.models import (
    cache_folder,
    kv_bytes_per_token,
    long_prompts,
    prepare,
    random_prompts,
)

CONFIG = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a config, and a tokenizer that knows single bytes only."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_long_prompts_are_disjoint_parts_of_one_text(model: Path) -> None:
    prompts = long_prompts(model, 3, 500)

    assert [len(prompt) for prompt in prompts] == [500, 500, 500]
    assert [token for prompt in prompts for token in prompt] == long_prompts(model, 1, 1500)[0]


def test_more_than_the_text_has_is_refused(model: Path) -> None:
    with pytest.raises(Refused, match="fewer or shorter"):
        long_prompts(model, 10, 100_000)


def test_random_prompts_share_nothing_and_come_again_by_their_seed(model: Path) -> None:
    prompts = random_prompts(model, 8, 16, seed=1)

    assert prompts == random_prompts(model, 8, 16, seed=1)
    assert len({tuple(prompt) for prompt in prompts + random_prompts(model, 8, 16, seed=2)}) == 16
    assert all(0 <= token < CONFIG["vocab_size"] for prompt in prompts for token in prompt)


def test_kv_bytes_follow_from_the_config(model: Path) -> None:
    assert kv_bytes_per_token(model, 4) == 2 * 3 * 2 * 16 * 4


def test_a_model_that_is_there_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder() / "SmolLM2-135M-Instruct-float32"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")

    assert prepare(tmp_path / "log") == folder
    assert not (tmp_path / "log").exists()


def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("kvfabric_client.models.PACKAGE", "no_such_package")

    with pytest.raises(Refused, match="pip install"):
        prepare(tmp_path / "log")
