"""The SDK: `connect` and `Client`. Synchronous and thread-safe.

A client talks to its home node, the one on its own host; what that does not hold is
fetched from where the manager says it lies. When the home node goes away, the next call
takes another one. Every call ends by its deadline, and when a call has ended, returned
or raised, nothing of it touches the caller's buffers any more.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kvfabric.errors import DeadlineExceeded, FabricError, Refused, Retry, Unreachable
from kvfabric.logs import guest_logger
from kvfabric.rpc.v1 import control_pb2, node_pb2, types_pb2
from kvfabric.types import DEFAULT_TENANT, Key, Namespace, NamespaceId
from kvfabric_client import discovery
from kvfabric_client.closing import Closing
from kvfabric_client.deadline import Deadline
from kvfabric_client.discovery import address_of
from kvfabric_client.ended import ended_sessions
from kvfabric_client.fleet import Fleet
from kvfabric_client.handoff import Holds
from kvfabric_client.link import Link
from kvfabric_client.manager import Manager
from kvfabric_client.renewals import Renewals
from kvfabric_client.room import Room

log = guest_logger(__name__)

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 5.0
LOCATE_TIMEOUT_S = 0.5  # better a miss than a late answer
LISTED_S = 1.0  # how long a listing of this host's nodes is trusted
CLOSE_TIMEOUT_S = 60.0  # for calls in other threads to end
FLEET_S = 10.0  # how long the manager's listing of all nodes will do
AVOID_S = 5.0  # how long a node that failed is not asked again, while there is another


def connect(
    home: str | None = None,
    *,
    tenant: str = DEFAULT_TENANT,
    principal: str = "",
    token: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    checksums: bool = True,
) -> Client:
    """A client of the fabric, connected to its home node.

    `home`: "unix:PATH" or "tcp:HOST:PORT"; by default KVFABRIC_HOME, else the first node
    of this host. `timeout_s`: for calls that do not say otherwise. `checksums=False` trusts
    memory and network: nothing is hashed, and nothing wrong is found. Raises Unreachable
    where no node answers.
    """
    secret = os.environ.get("KVFABRIC_TOKEN", "") if token is None else token
    client = Client(home, tenant, principal, secret, timeout_s, checksums=checksums)
    try:
        client.stats()
    except BaseException:
        client.close()
        raise
    return client


class Client(Closing):
    """See the module. `connect` makes one; it may also be made while no node is there."""

    def __init__(
        self,
        home: str | None = None,
        tenant: str = DEFAULT_TENANT,
        principal: str = "",
        token: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        *,
        checksums: bool = True,
    ) -> None:
        self.tenant = tenant
        self.timeout_s = timeout_s
        self.checksums = checksums
        self.copiers = ThreadPoolExecutor(1, "kvfabric-copy")
        self.renewals = Renewals()
        self.holds = Holds()
        self.fleet = Fleet(lambda deadline: self.manager().nodes(deadline))
        self._home = home
        self._principal = f"{tenant}/{principal}" if principal else tenant
        self._token = token.encode()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._calls = 0  # under way
        self._links: dict[str, Link] = {}  # by address
        self._avoid: dict[str, float] = {}  # until when, by address
        self._hanging: dict[str, float] = {}  # the same of those that answered too late
        self._addresses: list[str] = []
        self._listed_until_s = 0.0
        self._manager: Manager | None = None
        self._closed = False

    def open(self, namespace: Namespace) -> Room:
        """The room of one namespace. It opens lazily, so this works while no node is there."""
        if namespace.tenant != self.tenant:
            raise Refused(
                f"a client of tenant {self.tenant!r} cannot open a namespace of "
                f"{namespace.tenant!r}; connect with tenant={namespace.tenant!r}"
            )
        return Room(self, namespace)

    def stats(self, timeout_s: float | None = None) -> types_pb2.NodeStats:
        """The home node's."""
        deadline = self.deadline(timeout_s)

        def ask(link: Link) -> types_pb2.NodeStats:
            answer = link.call("stats", node_pb2.StatsRequest(), deadline.at_s)
            return answer.stats_response.stats

        return self.at_home(ask, deadline)

    def nodes(self, timeout_s: float | None = None) -> list[control_pb2.NodeInfo]:
        """Every node that the manager knows."""
        return self.manager().nodes(self.deadline(timeout_s))

    def report_steps(
        self,
        batch: Sequence[int],
        tokens: Sequence[int],
        seconds: Sequence[float],
        *,
        waiting: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        """Tells the planner what an engine measured of its steps, at most a few thousand a call.

        Per step: requests in its batch, tokens of KV attended, seconds. `waiting`: requests in
        the engine's queue now.
        """
        if not len(batch) == len(tokens) == len(seconds):
            raise Refused(
                f"{len(batch)} batches, {len(tokens)} token counts and {len(seconds)} durations; "
                "give one of each per step"
            )
        request = node_pb2.ReportStepsRequest(
            batch=batch, tokens=tokens, seconds=seconds, waiting=waiting
        )
        deadline = self.deadline(timeout_s)
        self.at_home(lambda link: link.call("report_steps", request, deadline.at_s), deadline)

    def manager(self) -> Manager:
        """The control plane. Unreachable where this fabric has none."""
        with self._lock:
            if self._manager is None:
                address = discovery.manager_address() or next(
                    (link.hello.manager for link in self._links.values() if link.hello.manager), ""
                )
                if not address:
                    raise Unreachable(
                        "no manager is known; start one with `kvfabric up`, or set KVFABRIC_MANAGER"
                    )
                self._manager = Manager(address)
            return self._manager

    def close(self) -> None:
        """Ends all sessions, once the calls under way in other threads have ended: before that
        they may be filling memory that a node takes back with the session. Views that are
        still open must not be used any more.
        """
        with self._lock:
            self._closed = True
            if not self._idle.wait_for(lambda: not self._calls, CLOSE_TIMEOUT_S):
                log.error("calls_do_not_end", count=self._calls, effect="their sessions stay open")
                return
        self.renewals.close()
        self.copiers.shutdown()
        with self._lock:
            for link in self._links.values():
                link.close()
            self._links.clear()
            if self._manager is not None:
                self._manager.close()

    # For the rooms ------------------------------------------------------------------

    def deadline(self, timeout_s: float | None) -> Deadline:
        return Deadline.after(self.timeout_s if timeout_s is None else timeout_s)

    def at_home(self, call: Callable[[Link], T], deadline: Deadline) -> T:
        """Runs `call` with the home node, or with the next one that answers."""
        failure: FabricError | None = None
        for address in self._candidates():
            try:
                return self.at(address, call, deadline)
            except Unreachable as error:
                failure = failure or error
        raise failure or Unreachable(
            "no node is running on this host; start one with `kvfabric up`, or set KVFABRIC_HOME"
        )

    def at(self, address: str, call: Callable[[Link], T], deadline: Deadline) -> T:
        """Runs `call` with the node at `address`; remembers when it does not answer."""
        with self._lock:
            if self._closed:
                raise Refused("this client is closed; connect again")
            self._calls += 1
        try:
            result = call(self._link(address, deadline))
        except (Unreachable, DeadlineExceeded):
            self._avoid[address] = time.monotonic() + AVOID_S
            raise
        finally:
            with self._lock:
                self._calls -= 1
                self._idle.notify_all()
        self._avoid.pop(address, None)
        return result

    def elsewhere(
        self,
        namespace: NamespaceId,
        keys: Sequence[Key],
        deadline: Deadline,
        tried: Sequence[Container[str]] = (),
    ) -> dict[str, list[int]]:
        """Addresses of other nodes that hold some of these keys, with the keys' indices.

        Of several replicas the best that did not just fail: asked again after a failure, it
        names another one. `tried`: per key, addresses that did not have it; they are left out,
        for what the manager knows of them may be older than that.
        """
        found: dict[str, list[int]] = {}
        if self._avoid.get("manager", 0.0) > time.monotonic():
            return found
        deadline = Deadline(min(deadline.at_s, time.monotonic() + LOCATE_TIMEOUT_S))
        try:
            places = self.manager().places(namespace, keys, deadline)
            if not any(places):
                return {}
            infos = {info.node: info for info in self.manager().nodes(deadline) if info.alive}
        except Retry as error:
            self._avoid["manager"] = time.monotonic() + AVOID_S
            log.debug("locate_failed", why=str(error), effect="a miss")
            return {}
        now_s = time.monotonic()
        for index, names in enumerate(places):
            known = [address_of(infos[name]) for name in names if name in infos]
            vain = tried[index] if tried else ()
            able = [address for address in known if address and address not in vain]
            if able:
                best = min(able, key=lambda each: self._avoid.get(each, 0.0) > now_s)
                found.setdefault(best, []).append(index)
        return found

    def addresses(self, deadline: Deadline) -> Iterator[str]:
        """Every node that may be written to: this host's first, then all that the manager knows
        to be alive and not being drained."""
        near = self._candidates()
        yield from near
        for info in self.fleet.nodes(deadline, FLEET_S).values():
            address = address_of(info)
            if info.alive and not info.draining and address and address not in near:
                yield address

    def address_of(self, node: str, deadline: Deadline) -> str:
        """How to reach the node of this name. Empty: nobody knows."""
        info = self.fleet.node(node, deadline, FLEET_S)
        if info is not None:
            return address_of(info)
        return next((a for a in self._candidates() if a.endswith(f"/{node}.sock")), "")

    def hangs(self, address: str) -> None:
        """This node did not answer in time."""
        self._hanging[address] = time.monotonic() + AVOID_S

    def hanging(self) -> set[str]:
        """Addresses of nodes that did not answer in time a moment ago."""
        if not self._hanging:
            return set()
        now_s = time.monotonic()
        return {address for address, until_s in list(self._hanging.items()) if until_s > now_s}

    def _candidates(self) -> list[str]:
        """Good ones first, then those that failed a moment ago."""
        now_s = time.monotonic()
        if now_s >= self._listed_until_s:
            self._addresses = list(discovery.candidates(self._home))
            self._listed_until_s = now_s + LISTED_S
        if not self._avoid:
            return self._addresses
        return sorted(self._addresses, key=lambda a: self._avoid.get(a, 0.0) > now_s)

    def _link(self, address: str, deadline: Deadline) -> Link:
        with self._lock:
            link = self._links.get(address)
        if link is None or not link.alive():
            link = self._fresh_link(address, deadline)
        if ended_sessions.any:
            link.confess(deadline.at_s)
        return link

    def _fresh_link(self, address: str, deadline: Deadline) -> Link:
        fresh = Link(address, self._principal, self._token, deadline.at_s, checked=self.checksums)
        with self._lock:
            current = self._links.get(address)
            if current is not None and current.alive():  # another thread was faster
                current, fresh = fresh, current
            self._links[address] = fresh
        if current is not None:
            current.close()
        return fresh
