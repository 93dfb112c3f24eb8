"""One engine prefills, another decodes on another node at once: no heartbeat comes in between."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.engines.manager import serving

from kvfabric.manager.service import ManagerServer
from kvfabric.types import Key, Namespace
from kvfabric_client import connect

if TYPE_CHECKING:
    from tests.engines.conftest import Engine, MemoryNode

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

Prompt = Callable[[int, int], list[int]]

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ManagerServer]:
    """Nodes register with it and then say nothing for a long time."""
    with serving(tmp_path, heartbeat_ms=60_000, silence_ms=600_000) as server:
        yield server


def test_what_one_engine_has_prefilled_another_decodes_at_once(
    manager: ManagerServer,
    start_node: Callable[..., MemoryNode],
    start_engine: Callable[..., Engine],
    prompt: Prompt,
) -> None:
    there = start_node(name="n0", manager=manager.address)
    here = start_node(name="n1", manager=manager.address)
    prefill, decode = start_engine(there.home), start_engine(here.home)
    for seed in range(3):
        context = prompt(1000, seed)
        first = prefill.hand(PREFILL, context, max_tokens=1)
        given = json.loads(json.dumps(first.transfer))
        answer, loaded = decode.hand(given, context, max_tokens=20), decode.loaded()
        if not _is_known(here, decode, context):
            break  # else a heartbeat came in between: one a minute
    else:
        pytest.fail("heartbeats came three times, although there is one a minute")
    assert given["do_remote_prefill"] is True
    assert given["do_remote_decode"] is False
    assert given["remote_num_tokens"] == 992
    assert given["kvfabric"]["node"] == "n0"
    assert len(given["kvfabric"]["keys"]) == 31
    assert loaded == 31 * (seed + 1)
    whole = prefill.hand(PREFILL, context, max_tokens=20)
    assert answer.tokens == whole.tokens
    assert answer.tokens[:1] == first.tokens
    assert whole.transfer is not None
    assert whole.transfer["remote_num_tokens"] == 992  # 1,019 tokens have the same full blocks

    # A hand-off of another prompt, or nonsense, is as good as none.
    other = prompt(500, 8)
    assert decode.hand(given, other).tokens == prefill.ask(other)[0].tokens
    for nonsense in (7, {**given["kvfabric"], "node": "n9"}):
        params = {"do_remote_prefill": True, "kvfabric": nonsense}
        assert decode.hand(params, prompt(200, 9)).tokens
    assert decode.loaded() == loaded

    # Without being asked an engine hands nothing off.
    assert decode.ask(context)[0].transfer is None

    # The node that was named dies before it is asked: what it had is computed.
    last = prompt(700, 10)
    given, expected = prefill.hand(PREFILL, last, max_tokens=1).transfer, prefill.ask(last)[0]
    assert given is not None
    there.kill()
    assert decode.hand(given, last).tokens == expected.tokens
    assert decode.loaded() == loaded


def _is_known(here: MemoryNode, engine: Engine, context: list[int]) -> bool:
    """Whether the decoder's node, or the manager it asks, has heard of the prompt's blocks."""
    fingerprint, parts = engine.keys(context)
    with connect(here.home) as fabric:
        room = fabric.open(Namespace("default", fingerprint))
        return room.match([Key(key) for key in parts[0]]).matched > 0
