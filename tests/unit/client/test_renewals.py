"""What the program holds is renewed in time, and nothing else."""

from __future__ import annotations

from kvfabric.errors import Refused, Unreachable
from kvfabric_client.renewals import MAX_UNUSED_S, Renewals


class Promise:
    def __init__(self, used_s: float = 0.0, *, ends: bool = False, fails: bool = False) -> None:
        self.used_s = used_s
        self.renewed = 0
        self.ends = ends
        self.fails = fails

    def renew(self) -> bool:
        self.renewed += 1
        if self.fails:
            raise Unreachable("nobody answers")
        return not self.ends


class Turned(Renewals):
    """Without its thread: only the test says when."""

    def _run(self) -> None:
        pass


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_each_is_renewed_when_it_is_due() -> None:
    clock = Hand()
    renewals = Turned(clock)
    often, seldom = Promise(), Promise()
    renewals.add(often, 10.0)
    renewals.add(seldom, 25.0)
    for now_s in range(0, 51, 5):
        clock.now_s = float(now_s)
        renewals.renew_due()
    assert (often.renewed, seldom.renewed) == (5, 2)
    assert renewals.renew_due() == 60.0
    renewals.close()
    assert len(renewals) == 0


def test_what_ended_was_collected_or_is_not_used_is_forgotten() -> None:
    clock = Hand()
    renewals = Turned(clock)
    ended, unused, away = Promise(ends=True), Promise(), Promise(fails=True)
    for promise in (ended, unused, away, Promise()):  # the last is garbage at once
        renewals.add(promise, 1.0)
    del promise
    clock.now_s = 1.0
    renewals.renew_due()
    assert len(renewals) == 2  # those that are only out of reach are tried again
    away.used_s = clock.now_s = MAX_UNUSED_S + 2
    renewals.renew_due()
    assert (ended.renewed, unused.renewed, away.renewed) == (1, 1, 2)
    assert len(renewals) == 1
    renewals.close()
    renewals.add(unused, 1.0)
    assert len(renewals) == 0


def test_what_is_refused_is_no_reason_to_stop() -> None:
    class Stubborn(Promise):
        def renew(self) -> bool:
            self.renewed += 1
            raise Refused("no")

    clock = Hand()
    renewals = Turned(clock)
    stubborn = Stubborn()
    renewals.add(stubborn, 1.0)
    for now_s in (1.0, 2.0):
        clock.now_s = now_s
        renewals.renew_due()
    assert stubborn.renewed == 2
    renewals.close()
