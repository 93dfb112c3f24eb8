"""Run by test_partition.py, in a network namespace of its own, which is the home node's host.

A bridge joins it to three further hosts: the manager's and the two lenders'.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from tests.faults.conftest import until
from tests.faults.loans.conftest import GROWN, QUIET_S, Growth, Lenders

ADDRESSES = {"home": "10.77.0.1", "east": "10.77.0.2", "west": "10.77.0.3", "": "10.77.0.4"}
HOSTS = {"east": "kvf-east", "west": "kvf-west", "": "kvf-manager"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=10)


@pytest.fixture
def lenders(lenders: Lenders, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lenders]:
    monkeypatch.setenv("KVFABRIC_HOST_ID", "kvf-home")
    ip("link", "add", "br0", "type", "bridge")
    ip("addr", "add", f"{ADDRESSES['home']}/24", "dev", "br0")
    ip("link", "set", "br0", "up")
    for number, (name, host) in enumerate(HOSTS.items()):
        ip("netns", "add", host)
        ip("link", "add", f"to{number}", "type", "veth", "peer", "name", "eth0", "netns", host)
        ip("link", "set", f"to{number}", "master", "br0", "up")
        ip("-n", host, "addr", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
        ip("-n", host, "link", "set", "eth0", "up")
        ip("-n", host, "link", "set", "lo", "up")
    lenders.hosts, lenders.addresses = HOSTS, ADDRESSES
    yield lenders
    for host in HOSTS.values():
        ip("netns", "delete", host)


def cut() -> None:
    """Home and east do not reach each other any more, and both reach all others."""
    ip("route", "add", "blackhole", f"{ADDRESSES['east']}/32")
    ip("-n", HOSTS["east"], "route", "add", "blackhole", f"{ADDRESSES['home']}/32")


def heal() -> None:
    ip("route", "del", "blackhole", f"{ADDRESSES['east']}/32")
    ip("-n", HOSTS["east"], "route", "del", "blackhole", f"{ADDRESSES['home']}/32")


def lent_by_east(lenders: Lenders) -> int:
    lent = lenders.ledger().lent
    return sum(
        size
        for creditor, size in zip(lent.creditor, lent.size_bytes, strict=True)
        if creditor == "east"
    )


def test_a_debtor_is_cut_off_from_a_creditor_and_comes_back(lenders: Lenders) -> None:
    lenders.start()
    growth = Growth(lenders.client(), blocks=GROWN // 2).wait()
    assert growth.missing() == 0
    until(lambda: lent_by_east(lenders) > 0, "east lends", QUIET_S)

    cut()
    # The loan is not renewed: the creditor voids it, and its shards are cache.
    until(lambda: lent_by_east(lenders) == 0, "a loan ends by its deadline", QUIET_S)
    more = Growth(lenders.client(), seed=2).wait()  # the other creditor lends

    assert more.missing() == 0
    assert {"alive": lenders.alive()} == {"alive": {"home", "east", "west"}}
    heal()

    # What the creditor still has as cache is there again; nothing is wrong.
    until(lambda: growth.missing() == 0, "all of it can be read again", QUIET_S)
    lenders.check_books()
    growth.close()
    more.close()
    lenders.check_quiet()
