"""The planner's place in the manager: what it is told, when, and what becomes of a plan.

A round has three steps, so that a shell can make the plan itself without the core's lock:
`demand` (what is known now), `planner.plan`, `adopt` (commands to the debtors).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from kvfabric.errors import Broken
from kvfabric.lending import planner
from kvfabric.lending.demand import Decision, Rules
from kvfabric.manager import sites
from kvfabric.manager.events import Heartbeat
from kvfabric.manager.outlook import Outlook, Told
from kvfabric.manager.parts import Cluster
from kvfabric.manager.wants import Demand, Want
from kvfabric.membership import Member, NodeState
from kvfabric.rpc.v1.control_pb2 import Command
from kvfabric.types import NodeId

PLAN_S = 1.0  # between two plans
HOLD_S = 15.0  # a debtor gets no new plan until the last is seen, but for no longer
SEEN_SHARE = 0.9  # of what was planned; then it is taken to be done
MAX_PLANS = 512  # remembered
_IDLE = Outlook()  # of a node that told of no engine


@dataclass(frozen=True, slots=True)
class Planned:
    """A decision that was ordered."""

    at_s: float
    decision: Decision


@dataclass(slots=True)
class _Hold:
    """A debtor that carries out what was planned for it."""

    until_s: float
    awaited: dict[int, float]  # sequence -> bytes on loan once it is done


class Planning:
    """See the module. A part of the core."""

    def __init__(self, cluster: Cluster, rules: Rules | None = None) -> None:
        self._cluster = cluster
        self._rules = rules or Rules()
        self._outlooks: dict[NodeId, Outlook] = {}
        self._holds: dict[NodeId, _Hold] = {}
        self._planned_s: float | None = None
        self.plans: deque[Planned] = deque(maxlen=MAX_PLANS)  # oldest first
        self.rounds = 0
        self.decisions = 0  # ordered, in all
        self.planned_bytes = 0

    # What nodes say

    def heard(self, member: Member, event: Heartbeat, now_s: float) -> None:
        if event.steps is None and event.sequences is None:
            return
        outlook = self._outlooks.get(event.node)
        if outlook is None:
            outlook = self._outlooks[event.node] = Outlook()
        if event.steps is not None:
            outlook.take_steps(event.steps, now_s)
        if event.sequences is not None:
            outlook.told = Told(event.sequences)
            self._look_at(event.node, outlook.told)

    def lost(self, node: NodeId, now_s: float) -> None:
        self._outlooks.pop(node, None)
        self._holds.pop(node, None)

    def tick(self, now_s: float) -> None:
        for outlook in self._outlooks.values():
            outlook.rest(now_s)
        for node in [each for each, hold in self._holds.items() if hold.until_s <= now_s]:
            del self._holds[node]

    def check(self) -> None:
        for node in self._holds:
            if self._cluster.members.known_incarnation(node) == 0:
                raise Broken(f"{node} is waited for, but unknown: a bug")

    def waiting(self, node: NodeId) -> int:
        """Requests in the queues of a node's engines."""
        outlook = self._outlooks.get(node)
        return outlook.waiting if outlook else 0

    # Rounds

    def round(self, now_s: float) -> list[Decision]:
        """All three steps at once, whether it is time or not. Returns what was ordered."""
        demand = self.demand(now_s)
        if demand is None:
            return []
        found = planner.plan(demand.instances, demand.contexts, demand.rates, self._rules)
        return self.adopt(found, now_s)

    def due(self, now_s: float) -> bool:
        """Whether it is time for a round; true once for each."""
        if self._planned_s is not None and now_s - self._planned_s < PLAN_S:
            return False
        self._planned_s = now_s
        return True

    def demand(self, now_s: float) -> Demand | None:
        """What is known of all nodes now; None where nobody is in need."""
        members = [each for each in self._cluster.members if each.state is not NodeState.LOST]
        outlooks = [self._outlooks.get(each.node) or _IDLE for each in members]
        if not self._anybody_in_need(members, outlooks):
            return None
        numbers = {member.node: index for index, member in enumerate(members)}
        rates = {
            (numbers[sender], numbers[receiver]): rate
            for sender, receiver, rate in self._cluster.links.known()
            if sender in numbers and receiver in numbers
        }
        wants = [
            Want(
                self._cluster.candidate(member),
                outlook.fit.model,
                outlook.batch,
                outlook.waiting,
                outlook.attended,
                outlook.told,
                member.node in self._holds,
            )
            for member, outlook in zip(members, outlooks, strict=True)
        ]
        return Demand(wants, rates)

    @property
    def rules(self) -> Rules:
        """What plans are made by."""
        return self._rules

    def adopt(self, decisions: Iterable[Decision], now_s: float) -> list[Decision]:
        """Order what was planned, as far as it still makes sense. Returns what was ordered."""
        self.rounds += 1
        ordered = []
        for each in decisions:
            stale = not self._cluster.alive(each.debtor) or not self._cluster.alive(each.creditor)
            if stale or each.creditor in self._cluster.draining:
                continue
            command = Command(
                why=each.why,
                lend_out=Command.LendOut(
                    sequence=each.sequence,
                    size_bytes=each.size_bytes,
                    creditor=each.creditor,
                    endpoints=self._cluster.members[each.creditor].endpoints,
                ),
            )
            if self._cluster.order(each.debtor, command, now_s):
                self._hold(each, now_s)
                self.plans.append(Planned(now_s, each))
                self.decisions += 1
                self.planned_bytes += each.size_bytes
                ordered.append(each)
        return ordered

    # Inside

    def _anybody_in_need(self, members: list[Member], outlooks: list[Outlook]) -> bool:
        for member, outlook in zip(members, outlooks, strict=True):
            if not len(outlook.told) or member.node in self._holds:
                continue
            tier = sites.memory(member)
            room = tier.free_bytes + sites.evictable_bytes(tier)
            if outlook.waiting or room < self._rules.pressure * tier.capacity_bytes:
                return True
        return False

    def _hold(self, decision: Decision, now_s: float) -> None:
        hold = self._holds.setdefault(decision.debtor, _Hold(now_s, {}))
        outlook = self._outlooks.get(decision.debtor)
        before = (outlook.told.remote_of(decision.sequence) if outlook else None) or 0
        hold.until_s = now_s + HOLD_S
        hold.awaited[decision.sequence] = before + SEEN_SHARE * decision.size_bytes

    def _look_at(self, node: NodeId, told: Told) -> None:
        """Whether what a debtor was told can be seen to be done, or its sequence is over."""
        hold = self._holds.get(node)
        if hold is None:
            return
        for sequence, awaited in list(hold.awaited.items()):
            remote = told.remote_of(sequence)
            if remote is None or remote >= awaited:
                del hold.awaited[sequence]
        if not hold.awaited:
            del self._holds[node]
