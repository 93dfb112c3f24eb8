"""The asyncio client is the synchronous one in threads: the same calls, the same answers."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import kvfabric_client
from kvfabric.errors import DeadlineExceeded, Refused
from kvfabric.types import Namespace, Status
from kvfabric_nodes.node import Node

from .conftest import key, payload
from .test_deadlines import eventually, promises, stalled
from .test_sequences import FORM, ids, kv

SPACE = Namespace("default", b"f" * 32)


def test_every_call_of_a_room_has_its_coroutine(home: str) -> None:
    async def main() -> None:
        async with await kvfabric_client.connect_async(home, timeout_s=20) as client:
            room = client.open(SPACE)
            shards = [payload(n, 100_000) for n in range(3)]
            keys = [key(n) for n in range(3)]
            assert await room.put(keys, shards, layers=2) == [Status.OK] * 3
            assert (await room.match(keys)).matched == 3
            for copy, shard in zip(await room.get(keys), shards, strict=True):
                assert copy is not None
                assert np.array_equal(copy, shard)
            target = np.zeros(100_000, np.uint8)
            assert await room.get_into(keys[:1], [target]) == [Status.OK]
            assert np.array_equal(target, shards[0])
            with await room.view(keys) as views:
                assert bytes(views[2] or b"") == bytes(shards[2])
            assert await room.pin(keys) == [Status.OK] * 3
            assert await room.unpin(keys) == [Status.OK] * 3
            assert [event.what for event in await room.explain(keys[0])] == ["committed"]
            assert (await client.stats()).node == "n0"
            assert await room.purge() == (3, 300_000)
            with pytest.raises(Refused):
                await room.put(keys, [])

    asyncio.run(main())


def test_sequences_groups_states_and_hand_offs_have_their_coroutines(home: str) -> None:
    prompt, floats = ids(60), kv(60)

    async def main() -> None:
        async with await kvfabric_client.connect_async(home, timeout_s=20) as client:
            room = client.open(SPACE)
            async with await room.sequence(FORM) as sequence:
                assert await sequence.append(prompt[:40], floats[..., :40, :]) == 40
                async with await sequence.fork(tentative=True) as fork:
                    await fork.append(prompt[40:], floats[..., 40:, :])
                    assert await sequence.accept(fork) == sequence.length == 60
                assert np.array_equal(await sequence.read(), floats)
                parts = [part async for _, part in sequence.chunks(max_bytes=1)]
                assert np.array_equal(np.concatenate(parts, axis=3), floats)
                target = np.empty_like(floats)
                assert await sequence.read_into(target) == []
                assert await sequence.seal() == sequence.sealed == 60
                places = await sequence.blocks()
                assert [place.node for place in places] == [sequence.node] * 4
                with await sequence.view(16, 32) as view:
                    assert len(view) == 1
                assert await sequence.truncate(16) == 16
                assert list(sequence.token_ids) == prompt[:16]
            keys = [place.key for place in places if place.key is not None]
            assert len(await room.take(await room.hand_off(keys), [bytearray(6144)] * 4)) == 4
            async with await room.group([keys, keys]) as group:
                assert [shared.key for shared in group.shared] == keys
            state = room.state("s")
            version = await state.put(b"one", expected=0)
            value = (await state.get()).value
            assert value is not None
            assert bytes(value) == b"one"
            assert await state.update(lambda value: b"two") > version
            await client.report_steps([1, 2], [100, 200], [0.1, 0.2], waiting=3)
            with pytest.raises(Refused, match="one of each per step"):
                await client.report_steps([1], [1, 2], [0.1])

    asyncio.run(main())


def test_many_calls_run_at_once(home: str) -> None:
    async def main() -> None:
        async with await kvfabric_client.connect_async(home, timeout_s=20) as client:
            room = client.open(SPACE)
            puts = [room.put([key(n)], [payload(n, 50_000)]) for n in range(20)]
            assert await asyncio.gather(*puts) == [[Status.OK]] * 20
            copies = await asyncio.gather(*(room.get([key(n)]) for n in range(20)))
            for number, [copy] in enumerate(copies):
                assert copy is not None
                assert np.array_equal(copy, payload(number, 50_000))

    asyncio.run(main())


def test_a_stalled_node_does_not_stall_the_event_loop(home: str, node: Node) -> None:
    async def main() -> None:
        async with await kvfabric_client.connect_async(home, timeout_s=20) as client:
            room = client.open(SPACE)
            await room.put([key(1)], [b"x"])
            with stalled(node):
                call = asyncio.ensure_future(room.get([key(1)], timeout_s=0.3))
                for _ in range(10):
                    await asyncio.sleep(0)
                assert not call.done()
                with pytest.raises(DeadlineExceeded):
                    await call
            await room.match([key(1)])

    asyncio.run(main())
    assert eventually(lambda: promises(node) == (0, 0))
