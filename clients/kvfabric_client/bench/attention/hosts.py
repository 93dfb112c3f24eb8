"""A second host on this machine: a network namespace behind a veth pair of a limited rate.

It has no name and goes with the process that holds it, and with those that run in it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import subprocess
from typing import Final

from kvfabric.errors import Refused

NETWORKS: Final = ipaddress.ip_network("198.18.0.0/15")  # kept for measuring networks
TOOLS: Final = ("unshare", "nsenter", "ip", "tc")
TIMEOUT_S: Final = 10.0
BURST: Final = "4mb"  # what a timer that comes late may catch up with
LATENCY: Final = "20ms"


def why_not() -> str:
    """Why there can be no second host; empty: there can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed (util-linux, iproute2)"
    return "" if os.geteuid() == 0 else "network namespaces need root"


class FarHost:
    """`address` is reached at `gbit_per_s` both ways; `within` runs a command there."""

    def __init__(self, gbit_per_s: int) -> None:
        """Refused where the machine does not allow it."""
        self._holder = subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.link = f"kvfb{self._holder.pid}"  # what both ends are called
        first = 4 * self._holder.pid % NETWORKS.num_addresses
        self._near, self.address = str(NETWORKS[first + 1]), str(NETWORKS[first + 2])
        try:
            self._await_holder()
            self.within = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net"]
            self._connect(gbit_per_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with contextlib.suppress(Refused):  # it was not made
            _run(f"ip link del {self.link}")
        self._holder.communicate(timeout=TIMEOUT_S)  # closes its input, upon which it ends

    def _await_holder(self) -> None:
        """It answers a line once it is where it should be."""
        assert self._holder.stdin is not None  # both were asked for as pipes
        assert self._holder.stdout is not None
        try:
            self._holder.stdin.write(b"\n")
            self._holder.stdin.flush()
        except BrokenPipeError:
            pass
        if not self._holder.stdout.readline():
            raise Refused("this machine allows no network namespaces")

    def _connect(self, gbit_per_s: int) -> None:
        link = self.link
        _run(f"ip link add {link} type veth peer name {link} netns {self._holder.pid}")
        _run("ip link set lo up", self.within)
        limit = f"rate {gbit_per_s}gbit burst {BURST} latency {LATENCY}"
        for address, within in ((self._near, []), (self.address, self.within)):
            _run(f"ip addr add {address}/30 dev {link}", within)
            _run(f"ip link set {link} up", within)
            _run(f"tc qdisc add dev {link} root tbf {limit}", within)


def _run(command: str, within: list[str] | None = None) -> None:
    done = subprocess.run(
        [*(within or []), *command.split()],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise Refused(f"this machine allows no limited network: {command}: {done.stderr.strip()}")
