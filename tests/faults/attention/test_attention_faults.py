"""Attention while nodes die, stop, are drained and come back: the right numbers, or which tokens
are lost, in time. Never a wrong number and never a hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from tests.faults.attention.conftest import SCALE, Context, Floats, assert_right
from tests.faults.conftest import until
from tests.faults.loans.conftest import BLOCK_TOKENS, HOME_BLOCKS, LAYERS, QUIET_S, Lenders

from kvfabric.attention.merge import Partial
from kvfabric.errors import FabricError, Retry
from kvfabric.rpc.v1 import control_pb2
from kvfabric_client.sequence_reads import Missing

pytestmark = pytest.mark.faults

LATE_S = 3.0  # a call's timeout where a node is silent
SLACK_S = 2.0  # what a busy machine may add to it


def lost_at(context: Context, node: str) -> set[int]:
    """The tokens of the blocks that lie at this node."""
    places = context.sequence.blocks()
    return {token for place in places if place.node == node for token in place.tokens}


def tokens_of(missing: Missing) -> set[int]:
    return {token for tokens in missing.ranges for token in tokens}


def restore(context: Context, missing: Missing) -> None:
    """What an engine does: computes just these tokens' KV and gives it back."""

    def restored() -> bool:
        try:
            for tokens in missing.ranges:
                context.sequence.restore(
                    tokens.start, context.kv[..., tokens.start : tokens.stop, :]
                )
        except Retry:
            return False
        return True

    until(restored, "there is room for what was lost")


def test_a_node_killed_between_two_layers_is_told_by_its_tokens_and_computed_again(
    lenders: Lenders,
) -> None:
    context = Context(lenders.start().client())
    shares = context.check(layer=0).tokens
    assert set(shares) == {"home", "east", "west"}
    gone = lost_at(context, "west")
    assert len(gone) == shares["west"]
    lenders.nodes.pop("west").kill()
    with pytest.raises(Missing) as failure:
        context.check(layer=1)
    assert tokens_of(failure.value) == gone
    restore(context, failure.value)
    for layer in range(LAYERS):
        context.check(layer)
    context.sequence.close(drop=True)
    lenders.check_quiet()


def test_a_node_killed_while_it_is_asked_the_same_again_and_again(lenders: Lenders) -> None:
    """What is prepared is right to the last, and then missing."""
    context = Context(lenders.start().client())
    queries = context.queries()
    wanted = [context.expected(layer, queries) for layer in range(LAYERS)]
    assert_right(context.attend(0, queries), wanted[0])
    gone = lost_at(context, "west")
    killer = threading.Timer(0.3, lenders.nodes.pop("west").kill)
    killer.start()
    with pytest.raises(Missing) as failure:
        attend_until(time.monotonic() + SLACK_S, context, queries, wanted)
    killer.join()
    assert tokens_of(failure.value) == gone
    restore(context, failure.value)
    for layer in range(LAYERS):
        context.check(layer)
    context.sequence.close(drop=True)
    lenders.check_quiet()


def attend_until(
    end_s: float, context: Context, queries: Floats, wanted: Sequence[Partial]
) -> None:
    while time.monotonic() < end_s:
        for layer, partial in enumerate(wanted):
            assert_right(context.attend(layer, queries), partial)


@pytest.mark.exhaustive
@pytest.mark.parametrize("attends", [1, 4])  # the more it was asked the same, the more is prepared
def test_a_node_that_is_silent_costs_its_tokens_within_the_deadline(
    lenders: Lenders, attends: int
) -> None:
    context = Context(lenders.start().client())
    for _ in range(attends):
        context.check()
    gone = lost_at(context, "east")
    lenders.nodes["east"].pause()
    began_s = time.monotonic()
    try:
        with pytest.raises((Missing, Retry)) as failure:
            context.check(timeout_s=LATE_S)
        assert time.monotonic() - began_s < LATE_S + SLACK_S
        if isinstance(failure.value, Missing):
            assert tokens_of(failure.value) == gone
    finally:
        lenders.nodes["east"].resume()

    def back() -> bool:
        try:
            context.check()
        except FabricError:
            return False
        return True

    until(back, "the node answers again, and what it has is attended", QUIET_S)


def test_a_node_drained_while_it_attends_never_costs_a_token(lenders: Lenders) -> None:
    context = Context(lenders.start().client(), blocks=2 * HOME_BLOCKS)
    assert context.check().tokens["east"]
    request = control_pb2.DrainRequest(node="east")
    with lenders.control() as stub:

        def empty() -> bool:
            for layer in range(LAYERS):
                context.check(layer)
            return bool(stub.Drain(request, timeout=10.0).empty)

        until(empty, "east is empty", QUIET_S)
    assert "east" not in context.check().tokens
    context.sequence.close(drop=True)
    lenders.check_quiet()


@pytest.mark.exhaustive
def test_the_home_may_be_killed_and_come_back(lenders: Lenders) -> None:
    context = Context(lenders.start().client())
    context.check()
    lenders.nodes.pop("home").kill()
    with pytest.raises(FabricError):
        context.check(timeout_s=LATE_S)
    lenders.start_node("home")
    kept = context.sequence.length

    def again() -> bool:
        nonlocal kept
        try:
            context.sequence.append([], context.kv[..., :0, :])  # opens it again
            kept = context.sequence.length
            queries = context.queries()
            answer = context.attend(0, queries)
        except Missing as missing:
            restore(context, missing)
            return False
        except FabricError:
            return False
        assert_right(answer, context.expected(0, queries, kept))
        return True

    until(again, "what is left of it is attended", QUIET_S)
    assert kept >= 2 * HOME_BLOCKS * BLOCK_TOKENS


def test_what_is_attended_while_its_tail_grows_is_a_whole_prefix(lenders: Lenders) -> None:
    context = Context(lenders.start().client(), blocks=4)
    first = context.tokens
    stop = threading.Event()
    failures: list[BaseException] = []

    def grow() -> None:
        try:
            while not stop.is_set() and context.tokens < 40 * BLOCK_TOKENS:
                context.grow(11)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=grow, name="grow")
    thread.start()
    try:
        for _ in range(100):
            length = context.sequence.length
            queries = np.random.default_rng(length).normal(size=(1, 4, 32)).astype(np.float32)
            answer = context.attend(1, queries, visible=length)
            assert_right(answer, context.expected(1, queries, length))
    finally:
        stop.set()
        thread.join(60.0)
    assert not failures
    assert context.tokens > first


@pytest.mark.exhaustive
def test_a_client_that_goes_while_its_query_is_computed_leaves_nothing_behind(
    lenders: Lenders,
) -> None:
    context = Context(lenders.start().client(), idle_s=2.0)
    queries = context.queries(512)
    context.attend(0, queries)
    ended: list[BaseException] = []

    def attend() -> None:
        try:
            while True:
                context.attend(1, queries)
        except FabricError as error:
            ended.append(error)

    thread = threading.Thread(target=attend, name="attend")
    thread.start()
    context.attend(1, queries)  # so that it is under way
    context.client.close()
    thread.join(20.0)
    assert ended
    lenders.check_quiet()


def test_queries_of_another_shape_are_refused_by_what_is_wrong(lenders: Lenders) -> None:
    context = Context(lenders.start().client(), blocks=2)
    good = context.queries()
    for queries, text in (
        (good[..., :16], "16"),
        (good[:, :0], "heads"),
        (np.repeat(good, 2, axis=0)[None], "shape"),
        (good.astype(np.float64), "float64"),
    ):
        with pytest.raises(FabricError, match=text):
            context.sequence.attend(queries, layer=0, scale=SCALE)
    with pytest.raises(FabricError, match="layer 9"):
        context.sequence.attend(good, layer=9, scale=SCALE)
    context.check()
