"""vLLM computes requests that its own KV memory could not hold: their KV lies on nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.engines.conftest import engine_starter, node_starter
from tests.engines.manager import serving

from kvfabric.manager.service import ManagerServer

if TYPE_CHECKING:
    from tests.engines.conftest import Answer, Engine, MemoryNode

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

Prompt = Callable[[int, int], list[int]]
Case = tuple[list[tuple[int, int]], dict[str, Any]]

OWN_BLOCKS = 14  # of 32 tokens; vLLM keeps one for itself
LIMITS = {"max_num_batched_tokens": 128, "max_num_seqs": 8, "enable_prefix_caching": False}

# What is asked: prompts by (tokens, seed), and the sampling parameters.
CASES: dict[str, Case] = {
    "within and beyond the engine's memory": (
        [(1500, 0), (900, 1), (40, 2), (700, 3), (96, 4), (300, 5)],
        {"max_tokens": 40},
    ),
    "many that need another block at once": ([(15, seed) for seed in range(8)], {"max_tokens": 40}),
    "one token each": ([(128, 1), (33, 2), (32, 3), (1, 4)], {"max_tokens": 1}),
    "up to the model's length": ([(2000, 6)], {"max_tokens": 100}),
    "a token that stops": ([(900, 1), (64, 2)], {"max_tokens": 60, "stop_token_ids": [*range(9)]}),
    "a string that stops": (
        [(900, 1), (64, 2)],
        {"max_tokens": 60, "stop": ["e", "a"], "detokenize": True},
    ),
    "several answers": (
        [(900, 7), (64, 8)],
        {"max_tokens": 30, "n": 3, "temperature": 1, "top_k": 1},
    ),
    "what prompt tokens score": ([(300, 5)], {"max_tokens": 8, "prompt_logprobs": 1}),
}


def context(**given: Any) -> dict[str, Any]:
    """Arguments of an engine whose KV lies elsewhere."""
    transfer = {
        "kv_connector": "KVFabricContextConnector",
        "kv_connector_module_path": "kvfabric_client.integrations.vllm_context",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
    }
    extra = given.pop("extra")
    return {
        **LIMITS,
        "num_gpu_blocks_override": OWN_BLOCKS,
        "scheduler_cls": "kvfabric_client.integrations.vllm_context.scheduler.ContextScheduler",
        "kv_transfer_config": {**transfer, "kv_connector_extra_config": extra},
        **given,
    }


def asked(engine: Engine, prompt: Prompt, case: Case) -> list[Answer]:
    prompts, params = case
    return engine.ask(*(prompt(*each) for each in prompts), **params)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryNode]:
    for start in node_starter(tmp_path_factory.mktemp("node")):
        yield start()


@pytest.fixture(scope="module")
def start_engines(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Engine]]:
    cache = tmp_path_factory.getbasetemp() / "cache"
    yield from engine_starter(tiny_model, tmp_path_factory.mktemp("engines"), cache)


@pytest.fixture(scope="module")
def wanted(start_engines: Callable[..., Engine], prompt: Prompt) -> dict[str, list[Answer]]:
    """What an engine with memory enough answers."""
    plain = start_engines("", kv_transfer_config=None, **LIMITS)
    answers = {name: asked(plain, prompt, case) for name, case in CASES.items()}
    plain.stop()
    return answers


@pytest.fixture(scope="module")
def small(
    node: MemoryNode, wanted: dict[str, list[Answer]], start_engines: Callable[..., Engine]
) -> Iterator[Engine]:
    """An engine with next to no memory, after the plain one has ended."""
    given = context(extra={"home": node.home}, disable_log_stats=False)
    engine = start_engines(node.home, **given)
    yield engine
    engine.stop()
    assert node.is_at_rest()


@pytest.mark.parametrize("name", CASES)
def test_it_answers_what_an_engine_with_memory_enough_answers(
    small: Engine, wanted: dict[str, list[Answer]], prompt: Prompt, name: str
) -> None:
    answers = asked(small, prompt, CASES[name])
    for answer, want in zip(answers, wanted[name], strict=True):
        assert answer.tokens == want.tokens
        assert answer.others == want.others
        assert answer.finish == want.finish
    stopped = any(answer.finish == "stop" for answer in answers)
    assert stopped == ("that stops" in name)


def test_requests_that_are_preempted_go_on_with_what_they_had(
    small: Engine, wanted: dict[str, list[Answer]], prompt: Prompt
) -> None:
    name = "many that need another block at once"
    before = small.preempted()
    answers = asked(small, prompt, CASES[name])
    assert small.preempted() > before
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in wanted[name]]


def test_what_the_fabric_holds_is_not_computed_again_except_under_another_salt(
    small: Engine, prompt: Prompt
) -> None:
    long = prompt(600, 20)
    salts = ("", "", "a", "a", "b", "")
    answers = [small.ask(long, salt=salt)[0] for salt in salts]
    assert [answer.cached for answer in answers] == [0, 576, 0, 576, 0, 576]
    assert len({tuple(answer.tokens) for answer in answers}) == 1


@pytest.mark.parametrize("after_steps", [1, 3, 20])
def test_aborted_requests_leave_nothing_open_at_the_node(
    small: Engine, node: MemoryNode, prompt: Prompt, after_steps: int
) -> None:
    prompts = [prompt(length, 30) for length in (700, 40, 300, 90, 500, 60, 33, 1, 8, 9)]
    small.abort(*prompts, max_tokens=200, after_steps=after_steps)
    assert node.counter("kvfabric_node_sequences") == 0
    assert node.counter("kvfabric_node_spans") == 0
    assert node.is_at_rest()


def test_weights_that_were_changed_in_place_share_nothing_with_those_before(
    small: Engine, prompt: Prompt
) -> None:
    long = prompt(600, 40)
    (before,) = small.ask(long)
    small.forget(connector=True)
    answers = [small.ask(long)[0] for _ in range(2)]
    assert [answer.cached for answer in answers] == [0, 576]
    assert [answer.tokens for answer in answers] == [before.tokens] * 2


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ManagerServer]:
    with serving(tmp_path, heartbeat_ms=100, silence_ms=2_000) as server:
        yield server


@pytest.mark.exhaustive
def test_requests_whose_node_dies_are_computed_again_at_another(
    manager: ManagerServer,
    start_node: Callable[..., MemoryNode],
    start_engine: Callable[..., Engine],
    prompt: Prompt,
    until: Callable[..., None],
) -> None:
    home, other = (start_node(name=name, manager=manager.address) for name in ("n0", "n1"))
    engine = start_engine(home.home, **context(extra={"home": home.home}))
    prompts = [prompt(length, seed) for seed, length in enumerate((600, 40, 300))]
    wanted = engine.ask(*prompts, max_tokens=100)
    shards = home.shards()
    engine.begin(*prompts, max_tokens=100, salt="again")  # nothing is shared with the first time
    until(lambda: home.shards() > shards + (600 + 40 + 300) // 32)  # all of them decode
    home.kill()
    answers = engine.answers()
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in wanted]
    assert "is computed again" in engine.log.read_text()
    engine.stop()
    assert other.is_at_rest()


@pytest.mark.exhaustive
def test_two_engines_share_while_both_decode_and_outlive_the_node_of_one(
    manager: ManagerServer,
    start_node: Callable[..., MemoryNode],
    start_engine: Callable[..., Engine],
    prompt: Prompt,
    until: Callable[..., None],
) -> None:
    """What dies has the middle of the second's context: its own node has what is before."""
    nodes = [start_node(name=name, manager=manager.address) for name in ("n0", "n1")]
    first, second = (
        start_engine(node.home, **context(extra={"home": node.home})) for node in nodes
    )
    long, own = prompt(1500, 1), prompt(300, 2)
    second.ask(long[:500])
    until(lambda: first.ask(long[:500], salt="")[0].cached == 480)  # it has heard of it
    (computed,) = first.ask(long, max_tokens=150)
    assert computed.cached == 480
    (alone,) = second.ask(own, max_tokens=150, salt="alone")

    first.begin(long, max_tokens=150)
    (read,) = second.ask(long, max_tokens=150)
    assert read.cached == 1472
    assert read.tokens == first.answers()[0].tokens == computed.tokens

    shards = nodes[1].shards()
    first.begin(long, max_tokens=150)
    second.begin(long, own, max_tokens=150)
    until(lambda: nodes[1].shards() > shards + 300 // 32 + 2)  # both decode
    nodes[0].kill()
    answers = second.answers()
    assert [answer.tokens for answer in answers] == [computed.tokens, alone.tokens]
    assert first.answers()[0].tokens == computed.tokens
    assert "is computed again" in second.log.read_text()
    for engine in (first, second):
        engine.stop()
    assert nodes[1].is_at_rest()


@pytest.mark.exhaustive
def test_with_vllms_own_scheduler_a_request_whose_kv_is_lost_ends_with_an_error_and_others_go_on(
    manager: ManagerServer,
    start_node: Callable[..., MemoryNode],
    start_engine: Callable[..., Engine],
    prompt: Prompt,
    until: Callable[..., None],
) -> None:
    there, home = (start_node(name=name, manager=manager.address) for name in ("n0", "n1"))
    before = start_engine(there.home, **context(extra={"home": there.home}))
    long, own = prompt(1500, 1), prompt(300, 2)
    wanted = [
        before.ask(one, max_tokens=300, salt=one_salt)[0]
        for one, one_salt in ((long, ""), (own, "x"))
    ]
    before.stop()
    engine = start_engine(home.home, **context(extra={"home": home.home}, scheduler_cls=None))
    engine.begin(long, own, max_tokens=300)
    until(lambda: home.shards() > 300 // 32 + 2)  # both decode
    there.kill()
    lost, answer = engine.answers()
    assert [lost.finish, answer.finish] == ["error", "length"]
    assert lost.tokens == wanted[0].tokens[: len(lost.tokens)]
    assert answer.tokens == wanted[1].tokens
    assert engine.ask(long, max_tokens=300)[0].tokens == wanted[0].tokens
    engine.stop()
    assert home.is_at_rest()


@pytest.mark.exhaustive
def test_requests_for_which_nodes_have_no_room_wait_for_others_or_end_with_an_error(
    start_node: Callable[..., MemoryNode], start_engine: Callable[..., Engine], prompt: Prompt
) -> None:
    node = start_node(memory="3MiB")  # 48 blocks
    engine = start_engine(node.home, **context(extra={"home": node.home}))
    prompts = [prompt(length, seed) for seed, length in enumerate((1000, 300, 900, 64, 800, 1900))]
    answers = engine.ask(*prompts, max_tokens=100)
    assert [answer.finish for answer in answers] == ["length"] * 5 + ["error"]
    for one, answer in zip(prompts[:5], answers, strict=False):
        assert engine.ask(one, max_tokens=100)[0].tokens == answer.tokens
    engine.stop()
    assert node.is_at_rest()


@pytest.mark.exhaustive
def test_an_engine_that_keeps_a_prefix_cache_of_its_own_does_not_start(
    start_node: Callable[..., MemoryNode], start_engine: Callable[..., Engine]
) -> None:
    node = start_node()
    arguments = context(extra={"home": node.home}, enable_prefix_caching=True)
    with pytest.raises(pytest.fail.Exception, match="enable_prefix_caching=False"):
        start_engine(node.home, **arguments)
