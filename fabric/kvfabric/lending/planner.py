"""Which memory should be lent by whom: the greedy plan of Infinite-LLM, over columns.

Debtors are instances with small batches and long requests that have a queue or no room,
creditors those with memory to spare (arXiv 2401.02669, its scheduling by debtors and
creditors). For a debtor's longest sequence the plan takes the creditor and the number of
blocks that gain most in tokens per second summed over both, by the step model of
`stepmodel`; then the next, until nothing gains any more or what links may carry is used up.
With an empty queue a move gains nothing but room: it is made only against pressure.

Pure: numpy in, decisions out; the same in production and in the simulator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from kvfabric.lending.demand import (
    UNKNOWN,
    Contexts,
    Decision,
    Flags,
    Floats,
    Instances,
    Ints,
    Rules,
)
from kvfabric.lending.placement import ASSUMED_BYTES_PER_S, LinkClass

__all__ = ["UNKNOWN", "Contexts", "Decision", "Instances", "Rules", "plan"]

DEFAULT_REQUEST_TOKENS = 1024.0  # of a waiting request, where no sequence is known

_WHERE = {
    LinkClass.SELF: "the same node",
    LinkClass.HOST: "on the same host",
    LinkClass.RACK: "in the same rack",
    LinkClass.ZONE: "in the same zone",
    LinkClass.FAR: "far off",
}


@dataclass(slots=True)
class _Choice:
    creditor: int
    size_bytes: float
    gain: float


@dataclass(slots=True)
class _State:
    """What changes while a plan is made; each array is a copy."""

    instances: Instances
    rules: Rules
    rates: Mapping[tuple[int, int], float]
    request_tokens: float  # of a request that waits
    token_bytes: float  # of one token, over all
    room: Floats = field(init=False)
    lendable: Floats = field(init=False)
    borrowed: Floats = field(init=False)
    gave: Flags = field(init=False)
    tokens: Floats = field(init=False)
    speed: Floats = field(init=False)  # tokens per second without the queue
    slowing: Floats = field(init=False)  # how much of that one more token costs
    sent: dict[tuple[int, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known, rules = self.instances, self.rules
        self.room = known.room_bytes.astype(np.float64)
        queue_bytes = known.waiting * self.request_tokens * self.token_bytes
        spare = self.room - rules.reserve * known.capacity_bytes - queue_bytes
        self.lendable = np.maximum(0.0, np.minimum(known.lendable_bytes, spare))
        self.lendable[known.draining] = 0.0
        self.borrowed = known.borrowed_bytes.astype(np.float64)
        self.gave = np.zeros(len(known.nodes), dtype=bool)
        self.tokens = known.tokens.astype(np.float64)
        seconds = known.step_s + known.request_s * known.batch + known.token_s * self.tokens
        self.speed = np.divide(known.batch, seconds, out=np.zeros(len(seconds)), where=seconds > 0)
        self.slowing = np.divide(
            self.speed * known.token_s, seconds, out=np.zeros(len(seconds)), where=seconds > 0
        )


def plan(
    instances: Instances,
    contexts: Contexts,
    rates: Mapping[tuple[int, int], float] | None = None,
    rules: Rules | None = None,
) -> list[Decision]:
    """What to lend now, most urgent debtor first.

    `rates` has the measured bytes a second from instance i to instance j, as far as known.
    The columns are not changed.
    """
    rules = rules or Rules()
    if len(instances.nodes) < 2 or not len(contexts.instance):
        return []
    state = _State(instances, rules, rates or {}, *_usual(contexts))
    order = np.lexsort((-contexts.local_bytes, contexts.instance))
    starts = np.searchsorted(contexts.instance[order], np.arange(len(instances.nodes) + 1))
    decisions: list[Decision] = []
    debtors = [(each, _classes(instances, each)) for each in _debtors(instances, contexts, state)]
    for turn in range(rules.max_sequences):  # everybody's longest, then everybody's next
        left = []
        for debtor, near in debtors:
            if len(decisions) >= rules.max_decisions:
                return decisions
            if starts[debtor] + turn >= starts[debtor + 1]:
                continue
            decision = _lend(state, contexts, debtor, int(order[starts[debtor] + turn]), near)
            if decision is not None:  # else a shorter sequence of it gains no more either
                decisions.append(decision)
                left.append((debtor, near))
        debtors = left
    return decisions


def _usual(contexts: Contexts) -> tuple[float, float]:
    """A usual request's tokens, and a token's bytes."""
    told = contexts.tokens > 0
    if not told.any():
        return DEFAULT_REQUEST_TOKENS, 0.0
    sizes = contexts.local_bytes[told] + contexts.remote_bytes[told]
    all_tokens = float(contexts.tokens[told].sum())
    return float(np.median(contexts.tokens[told])), float(sizes.sum()) / all_tokens


def _debtors(instances: Instances, contexts: Contexts, state: _State) -> list[int]:
    """Those that wait or have no room, smallest batch first, of equals the longest request."""
    longest = np.zeros(len(instances.nodes))
    np.maximum.at(longest, contexts.instance, contexts.local_bytes)
    pressed = state.room < state.rules.pressure * instances.capacity_bytes
    wanting = ((instances.waiting > 0) | pressed) & (longest > 0)
    found = np.flatnonzero(wanting)
    order = np.lexsort((-longest[found], instances.batch[found]))
    debtors: list[int] = found[order].tolist()
    return debtors


def _lend(state: _State, contexts: Contexts, debtor: int, row: int, near: Ints) -> Decision | None:
    """The best that can be done with one sequence, entered in the state; or None."""
    instances, rules = state.instances, state.rules
    if state.gave[debtor]:
        return None  # who lends does not borrow
    block = max(1.0, float(contexts.block_bytes[row]))
    own_tokens = float(contexts.tokens[row])
    own_bytes = float(contexts.local_bytes[row] + contexts.remote_bytes[row])
    token_bytes = own_bytes / own_tokens if own_tokens else state.token_bytes
    most = float(contexts.local_bytes[row]) - block  # the newest block stays at home
    waiting = float(instances.waiting[debtor])
    if most < block or token_bytes <= 0:
        return None
    if not waiting:
        short = rules.relief * float(instances.capacity_bytes[debtor]) - state.room[debtor]
        if short <= (rules.relief - rules.pressure) * float(instances.capacity_bytes[debtor]):
            return None  # there is room by now
        most = min(most, max(block, short))
    found = _creditors(state, debtor, near, block)
    if not len(found):
        return None
    choice = _best(state, debtor, found, near, most, block, token_bytes)
    if choice is None:
        return None
    _enter(state, debtor, choice, token_bytes)
    why = _why(state, contexts, debtor, row, choice, LinkClass(int(near[choice.creditor])))
    return Decision(
        instances.nodes[debtor],
        instances.nodes[choice.creditor],
        int(contexts.sequence[row]),
        int(choice.size_bytes),
        choice.gain,
        why,
    )


def _classes(instances: Instances, one: int) -> Ints:
    """The link class from `one` to every instance, as placement.link_class has it."""
    classes = np.full(len(instances.nodes), int(LinkClass.FAR))
    same_zone = instances.zone == instances.zone[one]
    if instances.zone[one] != UNKNOWN:
        classes[same_zone] = LinkClass.ZONE
    if instances.rack[one] != UNKNOWN:
        classes[same_zone & (instances.rack == instances.rack[one])] = LinkClass.RACK
    if instances.host[one] != UNKNOWN:
        classes[instances.host == instances.host[one]] = LinkClass.HOST
    classes[one] = LinkClass.SELF
    return classes


def _creditors(state: _State, debtor: int, near: Ints, block: float) -> Ints:
    """Those worth a closer look: the nearest, and the least loaded wherever they are."""
    usable = (state.lendable >= block) & (state.borrowed <= 0)
    usable[debtor] = False
    found = np.flatnonzero(usable)
    count = state.rules.near_creditors
    if len(found) <= 2 * count:
        return found
    slowing = state.slowing[found]
    share = state.lendable[found] / np.maximum(1.0, state.instances.capacity_bytes[found])
    merit = slowing / (slowing.max() or 1.0) - share
    by_merit = np.argpartition(merit, count)[:count]
    by_nearness = np.argpartition(near[found] * 4.0 + merit, count)[:count]
    return found[np.union1d(by_merit, by_nearness)]


def _best(
    state: _State,
    debtor: int,
    creditors: Ints,
    near: Ints,
    most: float,
    block: float,
    token_bytes: float,
) -> _Choice | None:
    """The creditor and the size that gain most; None where nothing gains enough."""
    limits = np.minimum(
        state.lendable[creditors],
        [_budget(state, debtor, int(each), int(near[each])) for each in creditors],
    )
    sizes = _sizes(state, debtor, min(most, float(limits.max())), block)
    if not len(sizes):
        return None
    known = state.instances
    moved = sizes / token_bytes if state.rules.attend_at_creditor else np.zeros(len(sizes))
    before = _speed(state, debtor, np.zeros(1), np.zeros(1))
    gains = _speed(state, debtor, sizes, moved) - before
    seconds = (
        known.step_s[creditors]
        + known.request_s[creditors] * known.batch[creditors]
        + known.token_s[creditors] * state.tokens[creditors]
    )[:, None] + known.token_s[creditors][:, None] * moved[None, :]
    after = np.divide(
        known.batch[creditors][:, None], seconds, out=np.zeros(seconds.shape), where=seconds > 0
    )
    total = gains[None, :] - (state.speed[creditors][:, None] - after)
    # Of equals the nearer, and against pressure too; it never turns a loss into a gain.
    rank = total - np.abs(total) * 0.01 * near[creditors][:, None]
    rank[sizes[None, :] > limits[:, None]] = -np.inf
    at, choice = divmod(int(np.argmax(rank)), len(sizes))
    if not np.isfinite(rank[at, choice]):
        return None
    gain = float(total[at, choice])
    if known.waiting[debtor] > 0:
        if gain <= state.rules.min_gain * float(before[0]) or gain <= 0:
            return None
    else:  # against pressure: as much as fits, at the creditor that it costs least
        choice = int(np.flatnonzero(sizes <= limits[at])[-1])
        gain = float(total[at, choice])
    return _Choice(int(creditors[at]), float(sizes[choice]), gain)


def _sizes(state: _State, debtor: int, most: float, block: float) -> Floats:
    """Whole blocks up to `most`: what lets one more request in, and steps between."""
    if most < block:
        return np.zeros(0)
    most = np.floor(most / block) * block
    request = state.request_tokens * state.token_bytes
    waiting = float(state.instances.waiting[debtor])
    steps = np.geomspace(block, most, 12)
    if waiting and request > 0:
        inside = np.floor(state.room[debtor] / request)
        further = np.unique(np.linspace(1, min(waiting, most / request + 1), 24).astype(int))
        steps = np.concatenate([steps, (inside + further) * request - state.room[debtor]])
    blocks = np.unique(np.ceil(np.clip(steps, block, most) / block))
    sizes = blocks * block
    return sizes[sizes <= most]


def _speed(state: _State, debtor: int, freed_bytes: Floats, moved_tokens: Floats) -> Floats:
    """The debtor's tokens per second once so many bytes are free and tokens attended elsewhere."""
    known = state.instances
    request = max(1.0, state.request_tokens * state.token_bytes)
    admitted = np.minimum(
        known.waiting[debtor], np.floor(np.maximum(0.0, state.room[debtor] + freed_bytes) / request)
    )
    batch = known.batch[debtor] + admitted
    tokens = state.tokens[debtor] - moved_tokens + admitted * state.request_tokens
    seconds = (
        known.step_s[debtor]
        + known.request_s[debtor] * batch
        + known.token_s[debtor] * np.maximum(0.0, tokens)
    )
    speed: Floats = np.divide(batch, seconds, out=np.zeros(len(seconds)), where=seconds > 0)
    return speed


def _budget(state: _State, debtor: int, creditor: int, near: int) -> float:
    """Bytes that the link may still carry in this plan."""
    rate = state.rates.get((debtor, creditor)) or ASSUMED_BYTES_PER_S[LinkClass(near)]
    allowed = rate * state.rules.link_share * state.rules.carry_s
    return allowed - state.sent.get((debtor, creditor), 0.0)


def _enter(state: _State, debtor: int, choice: _Choice, token_bytes: float) -> None:
    """As if the decision had been carried out."""
    creditor, size = choice.creditor, choice.size_bytes
    state.sent[debtor, creditor] = state.sent.get((debtor, creditor), 0.0) + size
    state.room[debtor] += size
    state.borrowed[debtor] += size
    state.lendable[debtor] = 0.0  # who owes does not lend
    state.gave[creditor] = True
    state.room[creditor] -= size
    state.lendable[creditor] -= size
    if state.rules.attend_at_creditor:
        moved = size / token_bytes
        state.tokens[debtor] = max(0.0, float(state.tokens[debtor]) - moved)
        state.tokens[creditor] += moved
        for each in (debtor, creditor):
            _refresh(state, each)


def _refresh(state: _State, one: int) -> None:
    known = state.instances
    seconds = float(
        known.step_s[one]
        + known.request_s[one] * known.batch[one]
        + known.token_s[one] * state.tokens[one]
    )
    state.speed[one] = float(known.batch[one]) / seconds if seconds > 0 else 0.0
    state.slowing[one] = state.speed[one] * known.token_s[one] / seconds if seconds > 0 else 0.0


def _why(
    state: _State, contexts: Contexts, debtor: int, row: int, choice: _Choice, near: LinkClass
) -> str:
    known = state.instances
    waiting = int(known.waiting[debtor])
    need = (
        f"{waiting} requests wait beside a batch of {int(known.batch[debtor])}"
        if waiting
        else "no request waits, but there is no room left"
    )
    return (
        f"{need}; its sequence {int(contexts.sequence[row])} has {int(contexts.tokens[row]):,} "
        f"tokens; {known.nodes[choice.creditor]}, {_WHERE[near]}, has "
        f"{int(state.lendable[choice.creditor]):,} bytes left to lend; {choice.gain:+.1f} tokens/s"
    )
