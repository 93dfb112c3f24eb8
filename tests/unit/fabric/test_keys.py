"""Fingerprints, namespaces, chains and keys are those of proto/vectors.json."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfabric import keys
from kvfabric.errors import Refused
from kvfabric.types import Fingerprint, Format, Namespace, NamespaceId, Part

Vectors = dict[str, Any]

FORM = Format(dtype="float32", block_tokens=32, packing="plain", layers=2, kv_heads=4, head_dim=8)
PRINT = Fingerprint("model", "revision", "config", "tokenizer", "rotary", FORM)
ROOM = NamespaceId(bytes(range(32)))
PART = Part(first_token=0, tokens=32, first_layer=0, layers=2, first_head=0, heads=4)

_texts = st.text(max_size=8)
_numbers = st.integers(0, 2**32 - 1)


def _fingerprint(raw: dict[str, Any]) -> Fingerprint:
    return Fingerprint(**{**raw, "format": Format(**raw["format"])})


def _room(value: str) -> NamespaceId:
    return NamespaceId(bytes.fromhex(value))


def test_fingerprints_are_those_of_the_vectors(vectors: Vectors) -> None:
    for case in vectors["fingerprints"]:
        assert keys.fingerprint_digest(_fingerprint(case["fingerprint"])).hex() == case["digest"]


def test_namespace_ids_are_those_of_the_vectors(vectors: Vectors) -> None:
    for case in vectors["namespaces"]:
        namespace = Namespace(
            case["tenant"], bytes.fromhex(case["fingerprint"]), bytes.fromhex(case["salt"])
        )
        assert keys.namespace_id(namespace).hex() == case["id"]


def test_chains_are_those_of_the_vectors(vectors: Vectors) -> None:
    for case in vectors["chains"]:
        links = keys.chain(case["blocks"], bytes.fromhex(case["start"]))
        assert [link.hex() for link in links] == case["links"]


def test_shard_keys_are_those_of_the_vectors(vectors: Vectors) -> None:
    for case in vectors["shard_keys"]:
        link = bytes.fromhex(case["link"])
        key = keys.shard_key(_room(case["namespace"]), link, Part(**case["part"]))
        assert key.hex() == case["key"]


def test_content_keys_are_those_of_the_vectors(vectors: Vectors) -> None:
    for case in vectors["content_keys"]:
        key = keys.content_key(_room(case["namespace"]), bytes.fromhex(case["content"]))
        assert key.hex() == case["key"]


@pytest.mark.parametrize(
    "other",
    [
        replace(PRINT, model="model2"),
        replace(PRINT, weights_revision="revision2"),
        replace(PRINT, config="config2"),
        replace(PRINT, tokenizer="tokenizer2"),
        replace(PRINT, rotary="rotary2"),
        replace(PRINT, format=replace(FORM, dtype="bfloat16")),
        replace(PRINT, format=replace(FORM, block_tokens=64)),
        replace(PRINT, format=replace(FORM, packing="other")),
        replace(PRINT, format=replace(FORM, layers=3)),
        replace(PRINT, format=replace(FORM, kv_heads=2)),
        replace(PRINT, format=replace(FORM, head_dim=16)),
        replace(PRINT, format=replace(FORM, kind="mla")),
    ],
)
def test_every_field_changes_the_fingerprint(other: Fingerprint) -> None:
    assert keys.fingerprint_digest(other) != keys.fingerprint_digest(PRINT)


@pytest.mark.parametrize(
    "other",
    [
        replace(PART, first_token=32),
        replace(PART, tokens=16),
        replace(PART, first_layer=1),
        replace(PART, layers=1),
        replace(PART, first_head=2),
        replace(PART, heads=2),
    ],
)
def test_every_field_of_the_part_changes_the_key(other: Part) -> None:
    link = keys.CHAIN_START
    assert keys.shard_key(ROOM, link, other) != keys.shard_key(ROOM, link, PART)


def test_an_unknown_weights_revision_is_refused_with_the_remedy() -> None:
    with pytest.raises(Refused, match="digest of the weight files or a commit id"):
        keys.fingerprint_digest(replace(PRINT, weights_revision=""))


def test_a_namespace_without_a_tenant_is_refused() -> None:
    with pytest.raises(Refused, match="needs a tenant"):
        keys.namespace_id(Namespace("", bytes(32)))


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_fingerprint_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(Refused, match=f"is 32 bytes, not {size}"):
        keys.namespace_id(Namespace("default", bytes(size)))


@given(_texts, _texts, _texts, _texts)
def test_a_text_that_moves_over_a_border_of_fields_changes_the_fingerprint(
    config: str, tokenizer: str, other_config: str, other_tokenizer: str
) -> None:
    one = replace(PRINT, config=config, tokenizer=tokenizer)
    two = replace(PRINT, config=other_config, tokenizer=other_tokenizer)
    assert (keys.fingerprint_digest(one) == keys.fingerprint_digest(two)) == (one == two)


@given(st.lists(st.lists(_numbers, min_size=1, max_size=4), min_size=1, max_size=6))
def test_a_chain_goes_on_from_any_of_its_links(blocks: list[list[int]]) -> None:
    links = list(keys.chain(blocks))
    for i, link in enumerate(links):
        assert list(keys.chain(blocks[i + 1 :], link)) == links[i + 1 :]


@given(st.lists(_numbers, min_size=2, max_size=6), st.integers(0, 5))
def test_another_token_anywhere_changes_every_later_link(tokens: list[int], at: int) -> None:
    at %= len(tokens)
    other = [*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]]
    pairs = zip(
        keys.chain([token] for token in tokens),
        keys.chain([token] for token in other),
        strict=True,
    )
    assert [one == two for one, two in pairs] == [i < at for i in range(len(tokens))]
