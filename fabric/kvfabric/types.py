"""The words of the fabric as Python values. What they mean: ARCHITECTURE.md, "Words"."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass, fields
from typing import NewType, Self

from kvfabric.rpc.v1 import types_pb2

Key = NewType("Key", bytes)  # 32 bytes
NamespaceId = NewType("NamespaceId", bytes)  # 32 bytes
NodeId = NewType("NodeId", str)

DIGEST_BYTES = 32
DEFAULT_TENANT = "default"
PROTOCOL_VERSION = 1
BATCH_KEYS = 4096  # per call; the SDK cuts larger batches


class Tier(enum.IntEnum):
    """Where a replica lies."""

    HBM = types_pb2.TIER_HBM
    DRAM = types_pb2.TIER_DRAM
    FILE = types_pb2.TIER_FILE


class Status(enum.IntEnum):
    """What became of one key of a batch."""

    OK = types_pb2.STATUS_OK
    EXISTS = types_pb2.STATUS_EXISTS
    MISS = types_pb2.STATUS_MISS
    REFUSED = types_pb2.STATUS_REFUSED
    RETRY = types_pb2.STATUS_RETRY


@dataclass(frozen=True, slots=True)
class Format:
    """Dimensions and packing of a shard's bytes: layer-major, K and V of a layer contiguous.

    The message's fields have the same names.
    """

    dtype: str
    block_tokens: int
    packing: str = "plain"
    layers: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    kind: str = "kv"

    def to_proto(self) -> types_pb2.Format:
        return types_pb2.Format(**asdict(self))

    @classmethod
    def from_proto(cls, form: types_pb2.Format) -> Self:
        return cls(**{field.name: getattr(form, field.name) for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class Part:
    """Which tokens, layers and KV heads a shard holds."""

    first_token: int
    tokens: int
    first_layer: int = 0
    layers: int = 1
    first_head: int = 0
    heads: int = 1


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What makes KV interchangeable; `weights_revision` is a digest or commit id."""

    model: str
    weights_revision: str
    config: str
    tokenizer: str
    rotary: str
    format: Format


@dataclass(frozen=True, slots=True)
class Namespace:
    """A closed room of keys: tenant + fingerprint digest (32 bytes) + salt."""

    tenant: str
    fingerprint: bytes
    salt: bytes = b""
