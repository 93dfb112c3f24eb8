"""A client in a process of its own, to be stopped and killed: `child.py ROLE ADDRESS ...`.

Writes a line of JSON for each step, and goes on when it is sent a line.
"""

from __future__ import annotations

import json
import mmap
import random
import sys
import time
from collections.abc import Callable

import numpy as np
from blake3 import blake3

from kvfabric import logs
from kvfabric.checksums import checksums
from kvfabric.errors import FabricError
from kvfabric.keys import namespace_id
from kvfabric.rpc.v1 import node_pb2, wire_pb2
from kvfabric.types import Key, Namespace, Status
from kvfabric.wire.connection import Connection
from kvfabric_client import Room, connect

SPACE = Namespace("default", bytes(32), b"faults")
TIMEOUT_S = 20.0


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)  # noqa: T201


def write(address: str, key: str, size: str, deadline_ms: str) -> None:
    """Reserves, fills half; on a line fills all and commits; on another lets go."""
    wire = Connection(address, time.monotonic() + TIMEOUT_S)
    hello = node_pb2.HelloRequest(min_version=1, max_version=1, features=["shm"])
    hello.namespaces.add(tenant=SPACE.tenant, fingerprint=SPACE.fingerprint, salt=SPACE.salt)
    wire.call("hello", hello, time.monotonic() + TIMEOUT_S)
    request = node_pb2.ReserveRequest(
        namespace_id=namespace_id(SPACE),
        keys=[bytes.fromhex(key)],
        size_bytes=[int(size)],
        deadline_ms=int(deadline_ms),
    )
    granted = wire.call("reserve", request, time.monotonic() + TIMEOUT_S).reserve_response
    segment, offset = granted.segments[0], granted.offsets[0]
    _, (descriptor,) = wire.call_for_descriptors(
        "map", wire_pb2.MapRequest(segments=[segment]), time.monotonic() + TIMEOUT_S
    )
    place = np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)[offset : offset + int(size)]
    place[: len(place) // 2] = 0xEE
    say(segment=segment, offset=offset)
    sys.stdin.readline()
    place[:] = 0xEE
    sums = checksums(memoryview(b"\xee" * int(size)))
    commit = node_pb2.CommitRequest(reservation=granted.reservation, checksums=sums)
    try:
        answer = wire.call("commit", commit, time.monotonic() + TIMEOUT_S).commit_response
        say(status=answer.statuses[0], reason=answer.reasons.get(0, ""))
    except FabricError as error:
        say(status=Status.REFUSED, reason=str(error))
    sys.stdin.readline()
    wire.close()


def hold(address: str, lease_ms: str, *keys: str) -> None:
    """Views shards; for each line tells their digests; after "release" lets go."""
    with connect(address, timeout_s=TIMEOUT_S) as client:
        room = client.open(SPACE)
        wanted = [Key(bytes.fromhex(key)) for key in keys]
        with room.view(wanted, lease_s=int(lease_ms) / 1000) as views:
            while True:
                say(digests=[blake3(view).hexdigest() if view else "" for view in views])
                if sys.stdin.readline().strip() == "release":
                    break
        say(released=True)
        sys.stdin.readline()


def churn(address: str, seed: str, seconds: str) -> None:
    """Puts and gets chained shards at random, and compares every byte it gets."""
    chance = random.Random(int(seed))
    counts = {"puts": 0, "hits": 0, "wrong": 0, "retries": 0}
    with connect(address, timeout_s=TIMEOUT_S) as client:
        room = client.open(SPACE)
        say(ready=True)
        end_s = time.monotonic() + float(seconds)
        while time.monotonic() < end_s:
            chain = chance.randrange(40)
            size = 16384 + 8192 * (chain % 3)  # of the chain: several sub-pools
            keys = [chained(chain, number) for number in range(chance.randrange(1, 12))]
            try:
                work(room, chance, keys, size, counts)
            except FabricError:
                counts["retries"] += 1
    say(**counts)


def work(
    room: Room, chance: random.Random, keys: list[Key], size: int, counts: dict[str, int]
) -> None:
    way = chance.randrange(4)
    if way == 0:
        contents = [content(key, size) for key in keys]
        statuses = room.put(keys, contents, parents=[None, *keys[:-1]], layers=2)
        counts["puts"] += statuses.count(Status.OK)
    elif way == 1:
        with room.view(keys, lease_s=5.0) as views:
            for key, view in zip(keys, views, strict=True):
                judge(key, size, view, counts)
            if chance.random() < 0.05:
                time.sleep(0.05)  # meanwhile others evict
            for key, view in zip(keys, views, strict=True):
                judge(key, size, view, counts)
    else:
        for key, copy in zip(keys, room.get(keys), strict=True):
            judge(key, size, None if copy is None else copy.data, counts)


def chained(chain: int, number: int) -> Key:
    return Key(blake3(f"churn/{chain}/{number}".encode()).digest())


def content(key: Key, size: int) -> bytes:
    """Derived from the key, so that every reader knows it."""
    return (key * (size // len(key)))[:size]


def judge(key: Key, size: int, data: memoryview | None, counts: dict[str, int]) -> None:
    if data is None:
        return
    counts["hits"] += 1
    if bytes(data) != content(key, size):
        counts["wrong"] += 1
        say(wrong=key.hex())


if __name__ == "__main__":
    roles: dict[str, Callable[..., None]] = {"write": write, "hold": hold, "churn": churn}
    logs.configure("error")
    roles[sys.argv[1]](*sys.argv[2:])
