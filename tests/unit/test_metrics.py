"""Metrics: declared once, cheap to change, served in Prometheus's own text."""

from __future__ import annotations

import re
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvfabric.errors import Refused
from kvfabric.metrics import (
    MANAGER_METRICS,
    NODE_METRICS,
    Metrics,
    MetricsServer,
    Spec,
)

ALL = [*NODE_METRICS, *MANAGER_METRICS]
SPECS = (
    Spec("kvfabric_test_shards", "gauge", "Shards.", ("tier",)),
    Spec("kvfabric_test_hits_total", "counter", "Hits."),
    Spec("kvfabric_test_call_seconds", "histogram", "Calls.", ("method",), (0.001, 0.1)),
)


def scrape(metrics: Metrics) -> dict[str, float]:
    server = MetricsServer(metrics, "127.0.0.1:0")
    try:
        url = f"http://{server.address}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
    finally:
        server.stop()
    return {
        f"{sample.name}{dict(sorted(sample.labels.items())) or ''}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_shows_what_was_counted() -> None:
    metrics = Metrics(SPECS)

    metrics.value("kvfabric_test_shards", "dram").value = 3
    metrics.value("kvfabric_test_hits_total").value += 2
    metrics.histogram("kvfabric_test_call_seconds", "Match").observe(0.1)
    metrics.histogram("kvfabric_test_call_seconds", "Match").observe(5.0)

    assert scrape(metrics) == {
        "kvfabric_test_shards{'tier': 'dram'}": 3,
        "kvfabric_test_hits_total": 2,
        "kvfabric_test_call_seconds_bucket{'le': '0.001', 'method': 'Match'}": 0,
        "kvfabric_test_call_seconds_bucket{'le': '0.1', 'method': 'Match'}": 1,
        "kvfabric_test_call_seconds_bucket{'le': '+Inf', 'method': 'Match'}": 2,
        "kvfabric_test_call_seconds_count{'method': 'Match'}": 2,
        "kvfabric_test_call_seconds_sum{'method': 'Match'}": 5.1,
    }


def test_flatten_names_every_sample_with_its_labels() -> None:
    metrics = Metrics(SPECS)
    metrics.value("kvfabric_test_shards", "dram").value = 3
    metrics.histogram("kvfabric_test_call_seconds", "Match").observe(0.5)

    assert metrics.flatten() == [
        ('kvfabric_test_shards{tier="dram"}', 3.0),
        ("kvfabric_test_hits_total", 0.0),
        ('kvfabric_test_call_seconds_count{method="Match"}', 1.0),
        ('kvfabric_test_call_seconds_sum{method="Match"}', 0.5),
    ]


def test_a_value_is_the_same_object_every_time() -> None:
    metrics = Metrics(SPECS)

    hits = metrics.value("kvfabric_test_hits_total")
    hits.value += 1

    assert metrics.value("kvfabric_test_hits_total") is hits


def test_undeclared_names_and_wrong_labels_are_errors() -> None:
    metrics = Metrics(SPECS)

    with pytest.raises(KeyError):
        metrics.value("kvfabric_test_misses_total")
    with pytest.raises(ValueError, match=r"has the labels \('tier',\), not 0 of them"):
        metrics.value("kvfabric_test_shards")


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
def test_names_say_kind_and_unit_last(spec: Spec) -> None:
    assert re.fullmatch(r"kvfabric_(node|manager)_[a-z]+(_[a-z]+)*", spec.name)
    assert spec.name.endswith("_total") == (spec.kind == "counter")
    assert bool(spec.buckets) == (spec.kind == "histogram")
    for unit in ("bytes", "seconds"):
        if unit in spec.name:
            assert spec.name.removesuffix("_total").endswith(f"_{unit}")
    assert spec.help.endswith(".")


def test_both_actors_tables_can_be_scraped_together() -> None:
    assert len({spec.name for spec in ALL}) == len(ALL)

    shown = scrape(Metrics(ALL))

    assert shown["kvfabric_node_hits_total"] == 0
    assert shown["kvfabric_manager_epoch"] == 0


@pytest.mark.parametrize("address", ["", "9400", "127.0.0.1:http", "127.0.0.1:70000"])
def test_an_address_that_cannot_be_served_is_refused(address: str) -> None:
    with pytest.raises(Refused, match="metrics"):
        MetricsServer(Metrics(SPECS), address)


def test_a_taken_port_is_refused_with_the_remedy() -> None:
    server = MetricsServer(Metrics(SPECS), "127.0.0.1:0")
    try:
        with pytest.raises(Refused, match="name another address, or port 0"):
            MetricsServer(Metrics(SPECS), server.address)
    finally:
        server.stop()
