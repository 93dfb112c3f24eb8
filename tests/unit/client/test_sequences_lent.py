"""A sequence whose blocks lie on several nodes: appended in one go, read, forked, cut, viewed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import kvfabric_client
from kvfabric.manager.service import ManagerServer
from kvfabric_client import Sequence
from kvfabric_client.sequence_home import Description
from kvfabric_nodes.node import Node

from .conftest import Start, address
from .test_deadlines import eventually
from .test_outgrown import (
    BLOCK_BYTES,
    FORM,
    HOME_BYTES,
    SEGMENT_BYTES,
    SPACE,
    manager,
    nodes,
    wait_connected,
)

__all__ = ["manager", "nodes"]  # fixtures

BLOCKS = 3 * HOME_BYTES // BLOCK_BYTES
TOKENS = BLOCKS * FORM.block_tokens
SHAPE = (FORM.layers, 2, FORM.kv_heads, TOKENS, FORM.head_dim)
FLOATS = np.random.default_rng(5).random(SHAPE, dtype=np.float32)


@pytest.fixture(params=["unix", "tcp"])
def grown(request: pytest.FixtureRequest, nodes: tuple[Node, Node]) -> Iterator[Sequence]:
    """Three times what its home can hold."""
    home = address(nodes[0], request.param)
    with kvfabric_client.connect(home, timeout_s=60) as client, contextlib.ExitStack() as stack:
        sequence = stack.enter_context(client.open(SPACE).sequence(FORM))
        assert sequence.append(range(TOKENS), FLOATS) == TOKENS
        yield sequence


def test_it_is_read_from_wherever_its_blocks_lie(grown: Sequence) -> None:
    places = [place.node for place in grown.blocks()]
    assert set(places) == {"home", "creditor"}
    assert places.count("creditor") >= BLOCKS // 2
    assert np.array_equal(grown.read(), FLOATS)
    assert np.array_equal(grown.read(100, 900, layers=range(1, 3)), FLOATS[1:3, ..., 100:900, :])
    with grown.view(0, 64) as view:
        parts = [block.kv for block in view if block.kv is not None]
        assert np.array_equal(np.concatenate(parts, axis=3), FLOATS[..., :64, :])
    for tokens, part in grown.chunks(max_bytes=1 << 20):
        assert np.array_equal(part, FLOATS[..., tokens.start : tokens.stop, :])


def test_a_block_that_has_moved_meanwhile_is_found_by_the_directory(
    grown: Sequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, reader = grown.writer.home, grown.writer.room.client
    true = home.describe

    def stale(*given: Any) -> Description:
        said: Description = true(*given)
        return replace(said, nodes=["home"] * len(said.nodes))

    with monkeypatch.context() as patched:
        patched.setattr(home, "describe", stale)
        assert eventually(lambda: grown.read_into(np.empty_like(FLOATS)) == [])
        assert np.array_equal(grown.read(), FLOATS)
        patched.setattr(reader, "elsewhere", lambda *_: {})
        missing = grown.read_into(np.empty_like(FLOATS))
        lent = true(grown.writer.room.client.deadline(5)).nodes.count("creditor")
        assert sum(map(len, missing)) == lent * FORM.block_tokens
        patched.setattr(home, "describe", true)
        assert np.array_equal(grown.read(), FLOATS)


def test_a_fork_shares_what_is_lent_and_a_cut_brings_its_block_home(grown: Sequence) -> None:
    assert grown.blocks()[1].node == "creditor"
    cut = FORM.block_tokens + 5
    with grown.fork(cut) as fork:
        assert fork.length == cut
        fork.append([7], FLOATS[..., :1, :])
        assert np.array_equal(fork.read(0, cut), FLOATS[..., :cut, :])
    assert np.array_equal(grown.read(), FLOATS)
    assert grown.truncate(cut) == cut
    assert np.array_equal(grown.read(), FLOATS[..., :cut, :])


def test_a_closed_one_gives_all_memory_back(grown: Sequence, nodes: tuple[Node, Node]) -> None:
    grown.close(drop=True)
    assert eventually(lambda: not any(node.sequences.all for node in nodes))
    for node in nodes:
        node.check()


def test_what_a_creditor_was_made_to_drop_is_nowhere_once_its_loan_is_renewed(
    start: Start, manager: ManagerServer
) -> None:
    given: dict[str, Any] = {"manager": manager.address, "loan_s": 1.5}
    home = start("home", memory=HOME_BYTES, segment=SEGMENT_BYTES, **given)
    creditor = start("creditor", memory=16 * HOME_BYTES, **given)
    wait_connected(home, creditor)
    with (
        kvfabric_client.connect(address(home, "unix"), timeout_s=60) as client,
        client.open(SPACE).sequence(FORM) as sequence,
    ):
        sequence.append(range(TOKENS), FLOATS)
        keys = [place.key for place in sequence.blocks() if place.node == "creditor"]
        with kvfabric_client.connect(address(creditor, "unix")) as vandal:
            vandal.open(SPACE).purge([key for key in keys[-3:] if key])
        lost = {token for run in sequence.read_into(np.empty_like(FLOATS)) for token in run}
        assert lost
        assert eventually(
            lambda: lost == {t for p in sequence.blocks() if not p.node for t in p.tokens}
        )
