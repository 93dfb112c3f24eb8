"""Simulated time: order, promises, tasks, and the hash of a history."""

from __future__ import annotations

import pytest

from kvfabric.simulation.engine import Promise, Simulation


def test_events_come_in_the_order_of_their_time_and_equal_ones_as_planned() -> None:
    simulation, seen = Simulation(1), list[tuple[float, str]]()

    def see(name: str) -> None:
        seen.append((simulation.now_s, name))

    simulation.at(2.0, see, "c")
    simulation.at(1.0, see, "a")
    simulation.at(1.0, see, "b")
    simulation.at(3.0, see, "too late")
    simulation.run(2.5)
    assert seen == [(1.0, "a"), (1.0, "b"), (2.0, "c")]
    assert simulation.now_s == 2.5


def test_a_cancelled_event_does_not_happen() -> None:
    simulation, seen = Simulation(1), list[str]()
    event = simulation.after(1.0, seen.append, "no")
    event.cancel()
    simulation.run(2.0)
    assert seen == []


def test_tasks_wait_for_promises_and_time() -> None:
    simulation, seen = Simulation(1), list[tuple[float, object]]()
    promise: Promise[str] = Promise(simulation)

    async def work() -> None:
        await simulation.sleep(1.0)
        seen.append((simulation.now_s, "slept"))
        for _ in range(2):  # the second time it is kept already
            value = await promise
            seen.append((simulation.now_s, value))

    simulation.start(work())
    simulation.after(3.0, promise.keep, "first")
    simulation.after(4.0, promise.keep, "second")
    simulation.run(10.0)
    assert seen == [(1.0, "slept"), (3.0, "first"), (3.0, "first")]


def test_a_killed_task_goes_no_further() -> None:
    simulation, seen = Simulation(1), list[str]()

    async def work() -> None:
        seen.append("begun")
        await simulation.sleep(1.0)
        seen.append("ended")

    task = simulation.start(work())
    simulation.after(0.5, task.kill)
    simulation.run(2.0)
    assert seen == ["begun"]
    assert task.done


def test_what_recurs_keeps_its_phase() -> None:
    simulation, seen = Simulation(1), list[float]()
    simulation.every(1.0, lambda: seen.append(simulation.now_s), 0.25)
    simulation.run(3.0)
    assert seen == [0.25, 1.25, 2.25]


@pytest.mark.parametrize("other", ["b 1.0", "a 2.0"])
def test_the_digest_tells_histories_apart(other: str) -> None:
    def digest(line: str) -> str:
        simulation = Simulation(1)
        name, at_s = line.split()
        simulation.at(float(at_s), simulation.note, name)
        simulation.run(5.0)
        return simulation.digest()

    assert digest("a 1.0") == digest("a 1.0")
    assert digest("a 1.0") != digest(other)
