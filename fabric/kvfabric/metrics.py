"""Every metric of both actors, declared once, and their values as plain attributes.

The owner of a `Metrics` updates it from one thread without a lock (a counter's
increment is one attribute addition); a scrape in another thread only reads. This is
the one module that imports prometheus_client, and only where metrics are served.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvfabric.errors import Refused

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

Kind = Literal["counter", "gauge", "histogram"]

CALL_BUCKETS_S = (
    0.00001,
    0.000025,
    0.00005,
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.01,
    0.1,
    1.0,
)


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric: its full name with the unit last, and the names of its labels."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper bounds, rising; histograms only


NODE_METRICS: tuple[Spec, ...] = (
    Spec("kvfabric_node_capacity_bytes", "gauge", "Size of the tier.", ("tier",)),
    Spec("kvfabric_node_held_bytes", "gauge", "Extents of sealed shards.", ("tier",)),
    Spec("kvfabric_node_reserved_bytes", "gauge", "Extents being written.", ("tier",)),
    Spec(
        "kvfabric_node_quarantined_bytes",
        "gauge",
        "Extents past their promise that a client may still touch.",
        ("tier",),
    ),
    Spec("kvfabric_node_free_bytes", "gauge", "Bytes that nothing occupies.", ("tier",)),
    Spec(
        "kvfabric_node_wasted_bytes",
        "gauge",
        "Bytes within the others that no shard can use.",
        ("tier",),
    ),
    Spec("kvfabric_node_ready_bytes", "gauge", "Bytes pre-faulted so far.", ("tier",)),
    Spec("kvfabric_node_shards", "gauge", "Sealed shards.", ("tier",)),
    Spec("kvfabric_node_sessions", "gauge", "Open sessions."),
    Spec("kvfabric_node_leases", "gauge", "Living leases."),
    Spec("kvfabric_node_pins", "gauge", "Pinned shards."),
    Spec("kvfabric_node_reservations", "gauge", "Living reservations."),
    Spec("kvfabric_node_hits_total", "counter", "Keys asked for and found."),
    Spec("kvfabric_node_misses_total", "counter", "Keys asked for and not found."),
    Spec("kvfabric_node_commits_total", "counter", "Shards sealed."),
    Spec("kvfabric_node_keeper", "gauge", "1 while a keeper has the node's memory too, else 0."),
    Spec("kvfabric_node_keeper_losses_total", "counter", "Keepers that ended or fell behind."),
    Spec("kvfabric_node_adopted_shards_total", "counter", "Shards kept over a restart."),
    Spec(
        "kvfabric_node_unadopted_shards_total",
        "counter",
        "Shards that a restart dropped.",
        ("reason",),
    ),
    Spec(
        "kvfabric_node_frozen_segments",
        "gauge",
        "Segments that clients of an earlier start may still map.",
    ),
    Spec(
        "kvfabric_node_commit_refusals_total", "counter", "Commits that were refused.", ("reason",)
    ),
    Spec("kvfabric_node_evicted_shards_total", "counter", "Shards dropped.", ("reason",)),
    Spec("kvfabric_node_evicted_bytes_total", "counter", "Bytes of dropped shards.", ("reason",)),
    Spec("kvfabric_node_expired_reservations_total", "counter", "Reservations past their time."),
    Spec("kvfabric_node_expired_leases_total", "counter", "Leases past their time."),
    Spec(
        "kvfabric_node_checksum_mismatches_total",
        "counter",
        "Layer parts whose bytes were not those committed.",
        ("where",),
    ),
    Spec("kvfabric_node_read_bytes_total", "counter", "Payload sent to clients.", ("transport",)),
    Spec(
        "kvfabric_node_read_seconds_total", "counter", "Time spent in sending it.", ("transport",)
    ),
    Spec(
        "kvfabric_node_written_bytes_total",
        "counter",
        "Payload received from clients.",
        ("transport",),
    ),
    Spec(
        "kvfabric_node_written_seconds_total",
        "counter",
        "Time spent in receiving it.",
        ("transport",),
    ),
    Spec(
        "kvfabric_node_protocol_errors_total",
        "counter",
        "Connections closed for what they sent.",
        ("transport",),
    ),
    Spec("kvfabric_node_heartbeats_total", "counter", "Heartbeats by their answer.", ("outcome",)),
    Spec("kvfabric_node_sequences", "gauge", "Open sequences."),
    Spec("kvfabric_node_loans", "gauge", "Loans that have not ended, lent and borrowed."),
    Spec("kvfabric_node_lent_bytes", "gauge", "Memory that is kept for other nodes."),
    Spec("kvfabric_node_borrowed_bytes", "gauge", "Memory of other nodes that is used."),
    Spec("kvfabric_node_pulls", "gauge", "Orders to copy shards from other nodes."),
    Spec("kvfabric_node_pulled_bytes_total", "counter", "Payload copied from other nodes."),
    Spec("kvfabric_node_pulled_seconds_total", "counter", "Time spent in copying it."),
    Spec(
        "kvfabric_node_pulled_keys_total",
        "counter",
        "Keys to be copied from other nodes, by what became of them.",
        ("outcome",),
    ),
    Spec("kvfabric_node_spans", "gauge", "Open spans: contexts that sessions attend here."),
    Spec("kvfabric_node_attended_rows_total", "counter", "Query rows attended."),
    Spec(
        "kvfabric_node_attended_bytes_total",
        "counter",
        "KV read by attention kernels.",
        ("kernel",),
    ),
    Spec(
        "kvfabric_node_attended_seconds_total",
        "counter",
        "Time spent in attention kernels.",
        ("kernel",),
    ),
    Spec(
        "kvfabric_node_attends_waited_seconds_total",
        "counter",
        "Time that attends waited for their turn.",
    ),
    Spec(
        "kvfabric_node_attends_stacked_total",
        "counter",
        "Queries that were attended together with others over the same blocks.",
    ),
    Spec(
        "kvfabric_node_attends_prepared_total",
        "counter",
        "Attends over what was prepared, on connections of their own.",
    ),
    Spec(
        "kvfabric_node_attend_gap_tokens_total",
        "counter",
        "Tokens that were to be attended and were not here.",
    ),
    Spec(
        "kvfabric_node_attend_refusals_total",
        "counter",
        "Attends that were not computed; full: too many waited, late: past their deadline, busy: "
        "prepared, while another was computed.",
        ("reason",),
    ),
    Spec(
        "kvfabric_node_commands_total",
        "counter",
        "Commands of the manager, by kind; stale: of an older epoch.",
        ("kind",),
    ),
    Spec(
        "kvfabric_node_call_seconds",
        "histogram",
        "Time to answer a call, without its transport.",
        ("method",),
        CALL_BUCKETS_S,
    ),
)

MANAGER_METRICS: tuple[Spec, ...] = (
    Spec("kvfabric_manager_nodes", "gauge", "Registered nodes by state.", ("state",)),
    Spec("kvfabric_manager_keys", "gauge", "Keys with at least one replica."),
    Spec("kvfabric_manager_replicas", "gauge", "Replicas of all keys."),
    Spec("kvfabric_manager_epoch", "gauge", "Starts of this manager's store."),
    Spec(
        "kvfabric_manager_heartbeats_total", "counter", "Heartbeats by their answer.", ("outcome",)
    ),
    Spec("kvfabric_manager_locate_keys_total", "counter", "Keys looked up."),
    Spec(
        "kvfabric_manager_locate_seconds",
        "histogram",
        "Time to look up a batch of keys.",
        buckets=CALL_BUCKETS_S,
    ),
    Spec(
        "kvfabric_manager_full_reports_total",
        "counter",
        "Full reports asked for, by what was wrong.",
        ("cause",),
    ),
    Spec("kvfabric_manager_nodes_lost_total", "counter", "Nodes that fell silent."),
    Spec("kvfabric_manager_moves", "gauge", "Moves under way, by what they are for.", ("kind",)),
    Spec("kvfabric_manager_draining_nodes", "gauge", "Nodes that are being emptied."),
    Spec("kvfabric_manager_pins", "gauge", "Keys pinned over the whole fabric."),
    Spec(
        "kvfabric_manager_copied_shards_total",
        "counter",
        "Shards that moves have copied, by what these were for.",
        ("kind",),
    ),
    Spec(
        "kvfabric_manager_dropped_shards_total",
        "counter",
        "Shards that moves had dropped at their source.",
        ("kind",),
    ),
    Spec("kvfabric_manager_loans", "gauge", "Loans by state, as creditors see them.", ("state",)),
    Spec("kvfabric_manager_lent_bytes", "gauge", "Lent, as creditors say."),
    Spec("kvfabric_manager_borrowed_bytes", "gauge", "Borrowed, as debtors say."),
    Spec("kvfabric_manager_borrows_total", "counter", "Nodes that asked for creditors."),
    Spec("kvfabric_manager_plans_total", "counter", "Loans that the planner ordered."),
    Spec("kvfabric_manager_planned_bytes_total", "counter", "Bytes of these."),
    Spec("kvfabric_manager_commands_total", "counter", "Commands posted for nodes."),
    Spec(
        "kvfabric_manager_commands_refused_total",
        "counter",
        "Commands whose node's queue was full.",
    ),
    Spec(
        "kvfabric_manager_plan_seconds",
        "histogram",
        "Time to make a plan.",
        buckets=(0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0),
    ),
)


class Value:
    """A counter or a gauge. Its owner changes `value` directly: that is the hot path."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class Histogram:
    """Counts of observations by upper bound; the last one has no bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, amount: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, amount)] += 1
        self.total += amount


class Metrics:
    """The values of one process's metrics. Look a value up once, keep it, change it."""

    def __init__(self, specs: Iterable[Spec]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._values: dict[str, dict[tuple[str, ...], Value]] = {}
        self._histograms: dict[str, dict[tuple[str, ...], Histogram]] = {}
        for spec in self._specs.values():
            if spec.kind == "histogram":
                self._histograms[spec.name] = {}
            else:
                self._values[spec.name] = {}
            if not spec.labels:  # a scrape shows its zero from the start
                self._make(spec)

    def value(self, name: str, *labels: str) -> Value:
        """The counter or gauge `name` with these label values, the same object every time.

        Raises KeyError for a name that is not declared, ValueError for wrong labels.
        """
        series = self._values[name]
        if labels not in series:
            self._make(self._specs[name], labels)
        return series[labels]

    def histogram(self, name: str, *labels: str) -> Histogram:
        """As `value`, for a histogram."""
        series = self._histograms[name]
        if labels not in series:
            self._make(self._specs[name], labels)
        return series[labels]

    def flatten(self) -> list[tuple[str, float]]:
        """Every sample as (name{label="value"}, value): what NodeStats.counters carries.

        A histogram gives its `_count` and `_sum`.
        """
        out: list[tuple[str, float]] = []
        for spec in self._specs.values():
            if spec.kind == "histogram":
                for labels, histogram in list(self._histograms[spec.name].items()):
                    count = float(sum(histogram.counts))
                    out.append((_sample_name(spec, "_count", labels), count))
                    out.append((_sample_name(spec, "_sum", labels), histogram.total))
            else:
                for labels, value in list(self._values[spec.name].items()):
                    out.append((_sample_name(spec, "", labels), float(value.value)))
        return out

    def collect(self) -> Iterator[Metric]:
        """Prometheus's Collector protocol; a scrape calls it, in its own thread."""
        for spec in self._specs.values():
            if spec.kind == "histogram":
                yield _histogram_family(spec, list(self._histograms[spec.name].items()))
            else:
                yield _value_family(spec, list(self._values[spec.name].items()))

    def _make(self, spec: Spec, labels: tuple[str, ...] = ()) -> None:
        if len(labels) != len(spec.labels):
            raise ValueError(f"{spec.name} has the labels {spec.labels}, not {len(labels)} of them")
        if spec.kind == "histogram":
            self._histograms[spec.name][labels] = Histogram(spec.buckets)
        else:
            self._values[spec.name][labels] = Value()


class MetricsServer:
    """`/metrics` over HTTP for one process, on a thread of its own."""

    def __init__(self, metrics: Metrics, address: str) -> None:
        """`address` is host:port; port 0 takes a free one. Refused where it cannot listen."""
        from prometheus_client import CollectorRegistry, start_http_server

        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise Refused(f"the metrics address {address!r} is not host:port, as in 127.0.0.1:9400")
        registry = CollectorRegistry()
        registry.register(metrics)
        try:
            self._server, self._thread = start_http_server(
                int(port), addr=host.strip("[]"), registry=registry
            )
        except (OSError, OverflowError) as error:
            raise Refused(
                f"cannot serve metrics on {address}: {error}; name another address, or port 0"
            ) from error
        self.address = f"{host}:{self._server.server_port}"

    def stop(self) -> None:
        """Closes the socket and ends the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _sample_name(spec: Spec, suffix: str, labels: tuple[str, ...]) -> str:
    pairs = zip(spec.labels, labels, strict=True)
    inside = ",".join(f'{name}="{value}"' for name, value in pairs)
    return f"{spec.name}{suffix}{{{inside}}}" if inside else f"{spec.name}{suffix}"


def _value_family(spec: Spec, series: Sequence[tuple[tuple[str, ...], Value]]) -> Metric:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    make = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
    family = make(spec.name, spec.help, labels=spec.labels)
    for labels, value in series:
        family.add_metric(labels, value.value)
    return family


def _histogram_family(spec: Spec, series: Sequence[tuple[tuple[str, ...], Histogram]]) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(spec.name, spec.help, labels=spec.labels)
    bounds = [*(str(bound) for bound in spec.buckets), "+Inf"]
    for labels, histogram in series:
        counts = itertools.accumulate(histogram.counts)
        family.add_metric(labels, list(zip(bounds, counts, strict=True)), histogram.total)
    return family
