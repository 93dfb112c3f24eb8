"""The whole bench, part by part, so that no two need their memory at once."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from kvfabric.errors import Refused
from kvfabric_client.bench.attention.fetching import Race
from kvfabric_client.bench.attention.field import Field
from kvfabric_client.bench.attention.hosts import FarHost, why_not
from kvfabric_client.bench.attention.kernels import Kernels
from kvfabric_client.bench.attention.plan import (
    FETCH,
    FETCH_LIMITED,
    KERNELS,
    NAMES,
    REMOTE,
    SDK,
    STACKED,
    WIRE,
    Plan,
)
from kvfabric_client.bench.attention.reading import Reader
from kvfabric_client.bench.attention.remote import Remote
from kvfabric_client.bench.attention.sdk import Sdk
from kvfabric_client.bench.attention.shapes import SHARD_BYTES
from kvfabric_client.bench.attention.stacking import Stacking
from kvfabric_client.bench.attention.wire import Wire
from kvfabric_client.bench.bare import BareSocket
from kvfabric_client.bench.children import Child
from kvfabric_client.bench.limits import PEER
from kvfabric_client.bench.report import Report, Row, machine
from kvfabric_client.bench.rounds import Case, run_rounds
from kvfabric_client.bench.targets import MIB

GBIT_PER_S: Final = 10
PEER_BYTES: Final = 128 * MIB
FAR_SHARDS: Final = 512

Advance = Callable[[Case], None]


def run(plan: Plan, advance: Advance = lambda case: None) -> Report:
    """`advance` is called after each case of each round, `plan.steps` times but for what is
    skipped. Broken where the fabric gave a wrong answer."""
    rows: list[Row] = []
    facts = machine(["torch"])
    skipped: dict[str, str] = {}
    if set(plan.names) - {*FETCH_LIMITED, WIRE}:
        rows += _here(plan, advance, facts)
    if limited := plan.named(FETCH_LIMITED):
        try:
            rows += _limited(plan, limited, advance)
        except Refused as error:
            skipped |= dict.fromkeys(limited, str(error))
    if counted := plan.named([WIRE]):
        with contextlib.closing(Wire()) as wire:
            rows += run_rounds(wire.cases(counted), plan.rounds, advance)
    rows.sort(key=lambda row: NAMES.index(row.name))
    return Report("kvfabric attention", rows, facts, skipped)


def _here(plan: Plan, advance: Advance, facts: dict[str, object]) -> list[Row]:
    """All that needs one node on this host."""
    rows: list[Row] = []
    with contextlib.ExitStack() as owned:
        field = owned.enter_context(contextlib.closing(Field(plan.shards)))
        if names := plan.named(KERNELS):
            reader = Reader(plan.shards * SHARD_BYTES)
            with contextlib.closing(reader):
                kernels = Kernels(field, reader)
                rows += run_rounds(kernels.cases(names), plan.rounds, advance)
            facts["kernels"] = kernels.chosen
        bare = owned.enter_context(_bare("127.0.0.1"))
        sdk = owned.enter_context(contextlib.closing(Sdk(field, bare)))
        cases = [
            *Remote(field, bare).cases(plan.named(REMOTE)),
            *sdk.cases(plan.named([SDK])),
            *Race(field, bare).cases(plan.named(FETCH)),
            *Stacking(field).cases(plan.named(STACKED)),
        ]
        if cases:
            rows += run_rounds(cases, plan.rounds, advance)
    return rows


def _limited(plan: Plan, names: Sequence[str], advance: Advance) -> list[Row]:
    """Against a node behind a slower network. Refused where there can be none."""
    if reason := why_not():
        raise Refused(reason)
    with contextlib.ExitStack() as owned:
        host = owned.enter_context(contextlib.closing(FarHost(GBIT_PER_S)))
        field = Field(min(plan.shards, FAR_SHARDS), host.address, host.within)
        owned.enter_context(contextlib.closing(field))
        bare = owned.enter_context(_bare(host.address, host.within))
        return run_rounds(Race(field, bare).cases(names), plan.rounds, advance)


@contextlib.contextmanager
def _bare(host: str, within: Sequence[str] = ()) -> Iterator[BareSocket]:
    with contextlib.ExitStack() as owned:
        folder = Path(owned.enter_context(tempfile.TemporaryDirectory()))
        options = ("--pool-bytes", str(PEER_BYTES), "--unix", str(folder / "peer.sock"))
        peer = owned.enter_context(Child(PEER, *options, "--host", host, within=within))
        bare = BareSocket(host, int(str(peer.ready["port"])))
        yield owned.enter_context(contextlib.closing(bare))
