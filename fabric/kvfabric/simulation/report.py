"""What runs came to, as plain values: for JSON, for a table, and for the lines below it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvfabric.simulation.parameters import WORKLOADS, Setup
from kvfabric.simulation.trial import Trial

MIN_GAIN = 1.3  # throughput with lending over that without it, for mixed lengths
MAX_DIFFERENCE = 0.02  # of the two, where all lengths are equal
MAX_PLAN_S = 2.0
MAX_SHARD_US = 5.0


def figures(trial: Trial) -> dict[str, Any]:
    """One run."""
    tally, costs = trial.tally, trial.costs
    return {
        "workload": trial.workload,
        "lending": trial.lending,
        "tokens_per_s": trial.tokens_per_s,
        "served_tokens_per_s": trial.served_per_s,
        "finished": tally.finished,
        "finished_by_kind": dict(sorted(tally.by_kind.items())),
        "rejected": tally.rejected,
        "preempted": tally.preempted,
        "waiting_at_end": trial.waiting,
        "waited_s": tally.waited_s / max(1, tally.admitted),
        "longest_context": tally.longest,
        "memory_used": trial.fill,
        "memory_imbalance": trial.imbalance,
        "moved_bytes": trial.moved_bytes,
        "lent_bytes": trial.lent_bytes,
        "cached_bytes_at_end": trial.cached_bytes,
        "open_sequences": trial.open_sequences,
        "directory_keys": trial.directory_keys,
        "plans": len(costs.plans_s),
        "decisions": costs.decisions,
        "plan_s_median": statistics.median(costs.plans_s) if costs.plans_s else 0.0,
        "plan_s_most": max(costs.plans_s, default=0.0),
        "heartbeats": costs.heartbeats.count,
        "heartbeat_shards": int(costs.heartbeats.x),
        "heartbeat_us": 1e6 * costs.heartbeats.base,
        "heartbeat_us_per_shard": 1e6 * costs.heartbeats.slope,
        "locate_us": 1e6 * costs.locate_s / max(1, costs.locates),
        "violations": trial.violations,
        "trace": trial.digest,
    }


def gains(trials: Sequence[Trial]) -> dict[str, dict[str, float]]:
    """Per workload: with lending over without."""
    found: dict[str, dict[str, float]] = {}
    for with_lending in trials:
        for without in trials:
            if (
                with_lending.lending
                and not without.lending
                and with_lending.workload == without.workload
            ):
                found[with_lending.workload] = {
                    "tokens_per_s": _ratio(with_lending.tokens_per_s, without.tokens_per_s),
                    "served_tokens_per_s": _ratio(with_lending.served_per_s, without.served_per_s),
                    "imbalance": _ratio(with_lending.imbalance, without.imbalance),
                }
    return found


def report(setup: Setup, trials: Sequence[Trial]) -> dict[str, Any]:
    """All of it, with what it stands on."""
    names = dict.fromkeys(trial.workload for trial in trials)
    return {
        "seed": setup.seed,
        "nodes": setup.nodes,
        "sequences": setup.sequences,
        "window_s": setup.window_s,
        "block_tokens": setup.block_tokens,
        "engine": asdict(setup.engine),
        "workloads": [asdict(WORKLOADS[name]) for name in names],
        "runs": [figures(trial) for trial in trials],
        "gains": gains(trials),
    }


def _ratio(one: float, other: float) -> float:
    return one / other if other else 0.0
