"""The limits move real bytes, to and from a real process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvfabric.errors import Unreachable
from kvfabric_client.bench.bare import BareSocket
from kvfabric_client.bench.children import Child
from kvfabric_client.bench.limits import PEER, Limits
from kvfabric_client.bench.peer import Ring

POOL_BYTES = 1 << 20
SHARD_BYTES = 64 << 10
Move = Callable[[Limits], Callable[[list[memoryview]], float]]


def _batch(fill: Callable[[int], bytes]) -> list[memoryview]:
    return [memoryview(bytearray(fill(SHARD_BYTES))) for _ in range(4)]


@pytest.mark.parametrize(
    ("put", "get"),
    [
        (lambda limits: limits.copy_in, lambda limits: limits.copy_out),
        (lambda limits: limits.tcp_put, lambda limits: limits.tcp_get),
    ],
    ids=["copy", "tcp"],
)
def test_what_a_limit_puts_it_gets(put: Move, get: Move) -> None:
    written = [_batch(os.urandom) for _ in range(4)]  # fills the pool: the ring is at its start
    with Limits(POOL_BYTES) as limits:
        assert all(put(limits)(batch) > 0 for batch in written)
        for batch in written:
            read = _batch(bytes)
            assert get(limits)(read) > 0
            assert read == batch


def test_a_ping_is_answered() -> None:
    with Limits(POOL_BYTES) as limits:
        assert limits.ping() > 0


def test_a_call_over_the_bare_socket_brings_an_answer_of_the_size_that_is_asked_for(
    tmp_path: Path,
) -> None:
    with Child(PEER, "--pool-bytes", "4096", "--unix", str(tmp_path / "peer.sock")) as peer:
        bare = BareSocket("127.0.0.1", int(str(peer.ready["port"])))
        with contextlib.closing(bare):
            assert bare.call(bytes(1000), memoryview(bytearray(3000))) > 0
            assert bare.get([memoryview(bytearray(500))]) > 0  # nothing of the answer was left


def test_a_ring_starts_again_where_a_slice_does_not_fit() -> None:
    ring = Ring(memoryview(bytearray(range(10))))
    taken = [bytes(ring.take(4)) for _ in range(3)]
    assert taken == [bytes([0, 1, 2, 3]), bytes([4, 5, 6, 7]), bytes([0, 1, 2, 3])]


def test_the_peer_ends_with_the_bench(tmp_path: Path) -> None:
    with Child(PEER, "--pool-bytes", "4096", "--unix", str(tmp_path / "peer.sock")) as peer:
        os.kill(peer.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(peer.pid, 0)


def test_a_child_that_says_nothing_is_unreachable_with_the_command_to_try() -> None:
    with pytest.raises(Unreachable, match="run `python -m this` to see why"):
        Child("this")
