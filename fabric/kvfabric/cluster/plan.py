"""What `kvfabric up` asks of the launcher: one JSON argument, checked where it arrives."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """A Ray of our own on this machine, with a memory node per Ray node."""

    runtime_dir: str
    mark: str
    scratch: str  # Ray's own directory: short, for the sake of its socket names
    nodes: int
    memory_bytes: int  # of each node
    manager_port: int  # 0: any free one
    attached: bool  # ends when its standard input ends


@dataclass(frozen=True, slots=True)
class JoinPlan:
    """A Ray that others run: only our actors are started in it."""

    runtime_dir: str
    address: str
    nodes: int  # to wait for; 0: as many as there are
    memory_bytes: int  # of each node
    manager_port: int


@dataclass(frozen=True, slots=True)
class LeavePlan:
    """Ends our actors in a Ray that others run."""

    address: str


Plan = LocalPlan | JoinPlan | LeavePlan
_KINDS: dict[str, type[LocalPlan] | type[JoinPlan] | type[LeavePlan]] = {
    "local": LocalPlan,
    "join": JoinPlan,
    "leave": LeavePlan,
}


def to_json(plan: Plan) -> str:
    kind = next(name for name, kind in _KINDS.items() if isinstance(plan, kind))
    return json.dumps({"kind": kind, **asdict(plan)})


def from_json(text: str) -> Plan:
    fields = json.loads(text)
    return _KINDS[fields.pop("kind")](**fields)
