"""What the SDK adds to a remote kernel: all that an engine waits for in one layer."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

import kvfabric_client
from kvfabric.attention.floats import narrowed
from kvfabric.errors import Broken
from kvfabric.types import Key
from kvfabric_client.attention.bank import Bank
from kvfabric_client.bench.attention.field import Field
from kvfabric_client.bench.attention.plan import REMOTE_TOKENS, target_of
from kvfabric_client.bench.attention.remote import CALLS, MICRO, ROUND_TRIPS
from kvfabric_client.bench.attention.shapes import MAIN
from kvfabric_client.bench.bare import BareSocket
from kvfabric_client.bench.lanes import STORED
from kvfabric_client.bench.rounds import Case, together

STEADY_CALLS: Final = 36  # three over each context: from then on it is as while decoding


class Sdk:
    """`Bank.attend` over TCP: the same path as that of sequences, over shards that are there."""

    def __init__(self, field: Field, bare: BareSocket) -> None:
        self._field = field
        self._bare = bare
        self._owned = contextlib.ExitStack()
        self._banks: dict[Key, Bank] = {}
        shape = (1, MAIN.query_heads, MAIN.head_dim)
        vectors = np.random.default_rng(0).standard_normal(shape, np.float32)
        self._queries: Any = narrowed(vectors, MAIN.dtype)

    def close(self) -> None:
        self._owned.close()

    def cases(self, names: Sequence[str]) -> list[Case]:
        if names:
            client = kvfabric_client.connect(self._field.tcp)
            self._room = self._owned.enter_context(contextlib.closing(client)).open(STORED)
        return [Case(name, 0, "us", *together(self._added), target_of(name)) for name in names]

    def _added(self) -> tuple[float, float]:
        """Beyond the kernel; two bare round trips with as large messages."""
        for _ in range(STEADY_CALLS):
            self._attend()
        added, trips = [], []
        for _ in range(CALLS):
            seconds, sent_bytes, received_bytes = self._attend()
            added.append(seconds)
            trips.append(self._bare.call(bytes(sent_bytes), memoryview(bytearray(received_bytes))))
        return statistics.median(added) * MICRO, ROUND_TRIPS * statistics.median(trips) * MICRO

    def _attend(self) -> tuple[float, int, int]:
        layer, keys = self._field.take(MAIN, REMOTE_TOKENS)
        bank = self._bank(keys)
        start = time.perf_counter()
        answer = bank.attend(self._queries, layer=layer)
        total_s = time.perf_counter() - start
        if sum(answer.tokens.values()) != REMOTE_TOKENS:
            raise Broken(f"of {REMOTE_TOKENS} tokens a node attended {answer.tokens}")
        traffic = answer.traffic
        return total_s - traffic.kernel_s, traffic.sent_bytes, traffic.received_bytes

    def _bank(self, keys: Sequence[Key]) -> Bank:
        if keys[0] not in self._banks:
            bank = self._room.bank(MAIN.format(), keys)
            self._banks[keys[0]] = self._owned.enter_context(contextlib.closing(bank))
        return self._banks[keys[0]]
