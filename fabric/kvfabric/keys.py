"""Namespaces, keys and fingerprints as bytes. proto/README.md is the specification.

Every digest is BLAKE3 with a derivation context of its own, so that no two kinds
of input can ever give the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence

from blake3 import blake3

from kvfabric.errors import Refused
from kvfabric.types import DIGEST_BYTES, Fingerprint, Key, Namespace, NamespaceId, Part

_FINGERPRINT = "kvfabric v1 fingerprint"
_NAMESPACE = "kvfabric v1 namespace"
_CHAIN = "kvfabric v1 chain"
_SHARD = "kvfabric v1 shard key"
_CONTENT = "kvfabric v1 content key"

_PART = struct.Struct("<QIIIII")

CHAIN_START = bytes(DIGEST_BYTES)


def _fields(*values: bytes | str | int) -> bytes:
    """Length-prefixed concatenation: no two lists of fields give the same bytes."""
    out = bytearray()
    for value in values:
        raw = (
            value.to_bytes(8, "little")
            if isinstance(value, int)
            else value.encode()
            if isinstance(value, str)
            else value
        )
        out += len(raw).to_bytes(4, "little") + raw
    return bytes(out)


def fingerprint_digest(fingerprint: Fingerprint) -> bytes:
    """32 bytes over every field. Refused where the weights revision is unknown."""
    if not fingerprint.weights_revision:
        raise Refused(
            f"the weights revision of {fingerprint.model!r} is unknown, so its KV cannot be "
            "shared; give a digest of the weight files or a commit id"
        )
    form = fingerprint.format
    raw = _fields(
        fingerprint.model,
        fingerprint.weights_revision,
        fingerprint.config,
        fingerprint.tokenizer,
        fingerprint.rotary,
        form.dtype,
        form.block_tokens,
        form.packing,
        form.layers,
        form.kv_heads,
        form.head_dim,
        form.kind,
    )
    return blake3(raw, derive_key_context=_FINGERPRINT).digest()


def namespace_id(namespace: Namespace) -> NamespaceId:
    """32 bytes. Refused for an empty tenant or a fingerprint that is not 32 bytes."""
    if not namespace.tenant:
        raise Refused("a namespace needs a tenant; the default one is called 'default'")
    if len(namespace.fingerprint) != DIGEST_BYTES:
        raise Refused(
            f"a fingerprint is {DIGEST_BYTES} bytes, not {len(namespace.fingerprint)}; "
            "see fingerprint_digest"
        )
    raw = _fields(namespace.tenant, namespace.fingerprint, namespace.salt)
    return NamespaceId(blake3(raw, derive_key_context=_NAMESPACE).digest())


def chain(blocks: Iterable[Sequence[int]], start: bytes = CHAIN_START) -> Iterator[bytes]:
    """chain_i = H(chain_{i-1}, tokens_i), 32 bytes for each block of token ids."""
    link = start
    for tokens in blocks:
        raw = link + struct.pack(f"<{len(tokens)}I", *tokens)
        link = blake3(raw, derive_key_context=_CHAIN).digest()
        yield link


def shard_key(namespace: NamespaceId, link: bytes, part: Part) -> Key:
    """H(namespace, chain_i, part). `link` may be an engine's own block hash."""
    packed = _PART.pack(
        part.first_token,
        part.tokens,
        part.first_layer,
        part.layers,
        part.first_head,
        part.heads,
    )
    raw = _fields(namespace, link, packed)
    return Key(blake3(raw, derive_key_context=_SHARD).digest())


def content_key(namespace: NamespaceId, content: bytes | memoryview) -> Key:
    """H(namespace, BLAKE3(content)): equal payloads are one shard within a namespace."""
    raw = _fields(namespace, blake3(content).digest())
    return Key(blake3(raw, derive_key_context=_CONTENT).digest())
