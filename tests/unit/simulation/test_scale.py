"""A directory filled and asked by real messages; small here, for the speed is shown elsewhere."""

from __future__ import annotations

from kvfabric.simulation.scale import DELTA_KEYS, measure_apart


def test_a_directory_is_measured_in_a_process_of_its_own() -> None:
    found = measure_apart(nodes=4, keys=40 * DELTA_KEYS)

    assert (found.nodes, found.keys) == (4, 40 * DELTA_KEYS)
    assert found.shard_us > 0
    assert found.locate_us_median > 0
    assert found.most_pause_ms > 0
    assert found.most_pause_for in ("a heartbeat", "a locate", "a tick")
