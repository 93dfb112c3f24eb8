"""Shards that are to go because others have them: first their leases end, then a holder is asked.

The manager's directory may show a replica whose node has just died. So nothing goes before
a holder has said that it has a copy, which it leases to the asker meanwhile. What no holder
has stays: the manager sees that it did not go. What keeps a shard here goes along: who has
the copy pins it, where it is pinned here, and keeps it for the groups that claim it. What
sequences, states and loans need stays.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.sequences.groups import Elsewhere, Group, Groups
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.shards import Shard

MAX_DROPS = 65_536  # shards that wait to be dropped
DROP_S = 15.0  # then a drop is forgotten: if it is still wanted, it comes again
MAX_QUESTIONS = 16  # at once
MAX_ASKED = 1024  # keys in one question
FRESH_S = 3.0  # an older answer says nothing: this node may have been stopped meanwhile

Holders = tuple[tuple[str, bytes], ...]  # names, and their endpoints as a message's bytes


NO_GROUPS: Mapping[int, int] = {}


@dataclass(frozen=True, slots=True)
class Keep:
    """What a group of this node keeps, and for how long still."""

    group: int
    keys: tuple[Key, ...]
    life_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """Whether a node has these keys, and pins and keeps some of them from now on."""

    node: str
    endpoints: bytes  # types_pb2.Endpoints
    namespace: NamespaceId
    keys: tuple[Key, ...]
    asked_s: float
    shards: tuple[Shard, ...]
    pinned: tuple[Key, ...]
    groups: tuple[Keep, ...]


@dataclass(slots=True, eq=False)
class _Wish:
    what: str
    why: str
    until_s: float
    holders: Holders
    asked: int = 0  # holders that have not got it
    question: Question | None = None  # that is under way


class Drops:
    """See the module. Who wants shards dropped calls `begin`, then `tick`; questions are taken
    from `questions` and each is answered once."""

    def __init__(self, core: NodeCore, groups: Groups | None = None) -> None:
        self.questions: list[Question] = []  # to be asked, emptied by who asks them
        self._core = core
        self._groups = groups or Groups(core)
        self._wishes: dict[Shard, _Wish] = {}
        self._open = 0  # questions without an answer

    def __len__(self) -> int:
        return len(self._wishes)

    def begin(
        self,
        namespace: NamespaceId,
        keys: Collection[Key],
        holders: Sequence[control_pb2.Command.Drop.Holder],
        what: str,
        why: str,
        now_s: float,
    ) -> None:
        """These are to go. Without holders nobody is asked. Said again, they wait for longer."""
        named = tuple(
            (holder.node, holder.endpoints.SerializeToString(deterministic=True))
            for holder in holders
        )
        room = self._core.shards.room(namespace)
        for key in keys:
            shard = room.get(key)
            if shard is None or self._stays(shard, named):
                continue
            wish = self._wishes.get(shard)
            if wish is not None and wish.holders == named:
                wish.until_s = now_s + DROP_S
            elif wish is not None or len(self._wishes) < MAX_DROPS:
                self._wishes[shard] = _Wish(what, why, now_s + DROP_S, named)

    def clear(self) -> None:
        """Nothing is dropped any more, whatever the answers say."""
        self._wishes.clear()

    def tick(self, now_s: float) -> bool:
        """Asks for what nobody leases any more. Whether something went without a question."""
        dropped = False
        ready: dict[tuple[NamespaceId, Holders, int], list[Shard]] = {}
        for shard, wish in list(self._wishes.items()):
            if not self._wanted(shard, wish, now_s):
                del self._wishes[shard]
            elif wish.question is not None or shard.extent.holders:
                continue
            elif wish.holders:
                ready.setdefault((shard.namespace, wish.holders, wish.asked), []).append(shard)
            else:
                self._drop(shard, wish, now_s)
                dropped = True
        for shards in ready.values():
            for start in range(0, len(shards), MAX_ASKED):
                if self._open < MAX_QUESTIONS:  # the rest at the next tick
                    self._ask(shards[start : start + MAX_ASKED], now_s)
        return dropped

    def answered(
        self,
        question: Question,
        held: Collection[Key],
        now_s: float,
        groups: Mapping[int, int] = NO_GROUPS,
    ) -> bool:
        """What the asked node has, leases to this one, and has pinned where that was asked;
        nothing, where it did not answer. `groups`: the number there of each group here for
        which it keeps them.

        Whether something was dropped.
        """
        self._open -= 1
        fresh = question.asked_s <= now_s <= question.asked_s + FRESH_S
        for keep in question.groups:
            if keep.group in groups:
                place = Elsewhere(question.node, question.endpoints, groups[keep.group])
                taken = set(keep.keys).intersection(held) if fresh else ()
                self._groups.hand_over(keep.group, taken, place, now_s)
        dropped = False
        further: list[Shard] = []
        for shard in question.shards:
            wish = self._wishes.get(shard)
            if wish is None or wish.question is not question:
                continue
            wish.question = None
            if not self._wanted(shard, wish, now_s):
                del self._wishes[shard]
            elif fresh and shard.key in held:
                if self._free(shard, question):  # else it is asked again, later
                    self._drop(shard, wish, now_s)
                    dropped = True
            else:
                wish.asked += 1
                if wish.asked < len(wish.holders):
                    further.append(shard)
                else:
                    del self._wishes[shard]
        if further:
            self._ask(further, now_s)
        return dropped

    def check(self) -> None:
        """Asserts the invariants."""
        assert len(self._wishes) <= MAX_DROPS
        assert len(self.questions) <= self._open <= MAX_QUESTIONS
        for shard, wish in self._wishes.items():
            assert wish.asked < max(1, len(wish.holders))
            assert wish.question is None or shard in wish.question.shards

    def _ask(self, shards: list[Shard], now_s: float) -> None:
        """Asks the next holder of these, which is the same for all."""
        wish = self._wishes[shards[0]]
        node, endpoints = wish.holders[wish.asked]
        keys = tuple(shard.key for shard in shards)
        question = Question(
            node,
            endpoints,
            shards[0].namespace,
            keys,
            now_s,
            tuple(shards),
            tuple(shard.key for shard in shards if shard.pinned),
            self._keeps(shards, now_s),
        )
        for shard in shards:
            self._wishes[shard].question = question
        self._open += 1
        self.questions.append(question)

    def _wanted(self, shard: Shard, wish: _Wish, now_s: float) -> bool:
        return shard.present and now_s < wish.until_s and not self._stays(shard, wish.holders)

    def _stays(self, shard: Shard, holders: Holders) -> bool:
        """Whether something needs it here that cannot follow it to a holder."""
        claims = self._core.shards.claims(shard.namespace, shard.key)
        if not holders:
            return shard.pinned or claims > 0
        return claims > 0 and claims > len(self._groups.of(shard.namespace, shard.key))

    def _free(self, shard: Shard, question: Question) -> bool:
        """Whether nothing keeps it here any more, now that the asked node has it."""
        pinned = shard.pinned and shard.key not in question.pinned
        return not (pinned or shard.extent.holders or self._core.shards.claimed(shard))

    def _keeps(self, shards: Sequence[Shard], now_s: float) -> tuple[Keep, ...]:
        kept: dict[Group, list[Key]] = {}
        for shard in shards:
            for group in self._groups.of(shard.namespace, shard.key):
                kept.setdefault(group, []).append(shard.key)
        return tuple(
            Keep(group.id, tuple(keys), max(0.0, group.deadline_s - now_s))
            for group, keys in kept.items()
        )

    def _drop(self, shard: Shard, wish: _Wish, now_s: float) -> None:
        del self._wishes[shard]
        self._core.drop(shard, wish.what, wish.why, now_s)
