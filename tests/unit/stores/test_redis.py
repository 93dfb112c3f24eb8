"""What is Redis's own: its server dies, forgets nothing, is somebody else's, or is away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import structlog
from tests.redis_server import RedisServer

from kvfabric.errors import Broken, Denied, Refused, Retry
from kvfabric.stores import MetadataStore, open_store
from kvfabric.stores.redis import PREFIX, RedisStore


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """One that a test may kill."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


def test_what_a_call_returned_is_there_after_kill_9_and_the_store_goes_on(
    server: RedisServer,
) -> None:
    store = open_store(server.address)
    version = store.put("policy", b"2 replicas")
    server.kill()

    with pytest.raises(Retry, match="does not answer"):
        store.get("policy")
    with pytest.raises(Retry, match="does not answer"):
        store.compare_and_set("policy", b"3", version)
    server.start()

    assert store.get("policy") == (b"2 replicas", version)
    assert store.compare_and_set("policy", b"3", version) > version
    store.close()


def test_a_store_where_no_redis_answers_is_a_retry_with_its_address(tmp_path: Path) -> None:
    with pytest.raises(Retry, match=r"nobody\.sock does not answer"):
        RedisStore(f"unix://{tmp_path}/nobody.sock")


def test_a_wrong_password_is_denied_and_not_repeated_in_the_text(server: RedisServer) -> None:
    with redis.Redis(unix_socket_path=str(server.socket)) as client:
        client.config_set("requirepass", "right")

    with pytest.raises(Denied, match="password") as caught:
        RedisStore(f"unix://:wrong@{server.socket}")

    assert "wrong@" not in str(caught.value)


def test_a_newer_schema_is_refused(redis_server: RedisServer) -> None:
    redis_server.clear()
    with redis.Redis(unix_socket_path=str(redis_server.socket)) as client:
        client.set(f"{PREFIX}:schema", b"9")

    with pytest.raises(Refused, match="run the newer kvfabric"):
        RedisStore(redis_server.address)
    redis_server.clear()


def test_keys_that_something_else_uses_are_broken_not_overwritten(
    redis_server: RedisServer,
) -> None:
    redis_server.clear()
    with redis.Redis(unix_socket_path=str(redis_server.socket)) as client:
        client.set(f"{PREFIX}:entries", b"mine")
        store: MetadataStore = RedisStore(redis_server.address)

        with pytest.raises(Broken, match="something else"):
            store.put("key", b"value")

        assert client.get(f"{PREFIX}:entries") == b"mine"
    store.close()
    redis_server.clear()


def test_a_redis_without_a_log_of_changes_is_warned_of(server: RedisServer) -> None:
    with redis.Redis(unix_socket_path=str(server.socket)) as client:
        client.config_set("appendonly", "no")

    with structlog.testing.capture_logs() as told:
        RedisStore(server.address).close()

    assert [entry["effect"] for entry in told] == [
        "a Redis that is killed forgets policies and pins"
    ]


@pytest.mark.parametrize("address", ["redis://host:notaport/0", "unix://"])
def test_an_address_that_cannot_be_one_is_refused(address: str) -> None:
    with pytest.raises((Refused, Retry)):
        open_store(address)
