"""Lent shards on their way here: room is reserved first, then the bytes are fetched into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvfabric.errors import Refused
from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric.types import Key, NamespaceId, Status
from kvfabric_nodes.copying.pulls import Pulled, PullOrder
from kvfabric_nodes.lending.post import Post
from kvfabric_nodes.store.core import NodeCore
from kvfabric_nodes.store.promises import Grant, Session

FILL_S = 600.0  # for the bytes to come; the puller gives up before

Ended = Callable[[PullOrder, str, float], None]  # the order, what went wrong, the time


@dataclass(frozen=True, slots=True)
class Cargo:
    """What is to be fetched, and from where."""

    namespace: NamespaceId
    tenant: str
    sizes: Mapping[Key, int]
    layers: int
    source: str
    endpoints: types_pb2.Endpoints
    loan: int
    why: str


class Transit:
    """The session that owns these reservations, and the orders that fill them."""

    def __init__(self, core: NodeCore, post: Post) -> None:
        self._core = core
        self._post = post
        self._orders: dict[int, tuple[PullOrder, Ended]] = {}
        self._session: Session | None = None

    def __contains__(self, order_id: int) -> bool:
        return order_id in self._orders

    def fetch(self, cargo: Cargo, ended: Ended, now_s: float) -> tuple[int, dict[Key, Grant]]:
        """The order for those keys that were granted room (0: none was), and every grant."""
        keys = list(cargo.sizes)
        try:
            reservation, grants = self._core.reserve(
                self._own_session(),
                cargo.namespace,
                keys,
                [None] * len(keys),
                list(cargo.sizes.values()),
                cargo.layers,
                FILL_S,
                0.0,
                now_s,
                streamed=True,
                tenant=cargo.tenant,
            )
        except Refused as error:
            return 0, dict.fromkeys(keys, Grant(Status.RETRY, reason=str(error)))
        by_key = dict(zip(keys, grants, strict=True))
        if reservation is None:
            self._close_idle_session(now_s)
            return 0, by_key
        order = PullOrder(
            id=self._post.number(),
            namespace=cargo.namespace,
            keys=tuple(key for key, grant in by_key.items() if grant.extent is not None),
            source=cargo.source,
            endpoints=cargo.endpoints,
            priority=control_pb2.PRIORITY_REPAIR,  # somebody waits for room
            loan=cargo.loan,
            reservation=reservation,
            why=cargo.why,
        )
        self._orders[order.id] = (order, ended)
        self._post.fetch(order)
        return order.id, by_key

    def cancel(self, order_id: int) -> None:
        """Not needed any more; it still ends."""
        if order_id in self._orders:
            self._post.cancel(order_id)

    def fetched(self, result: Pulled, now_s: float) -> None:
        """The puller has ended: nobody touches the reservation any more."""
        entry = self._orders.pop(result.order.id, None)
        if entry is None:
            return
        order, ended = entry
        reservation = order.reservation
        assert reservation is not None
        if reservation.id in reservation.session.reservations:
            self._core.abort(reservation)  # the shell did not even begin
        ended(order, result.why, now_s)
        self._close_idle_session(now_s)

    def check(self) -> None:
        """Asserts that nothing is reserved but for an order."""
        if self._session is not None:
            orders = [order.reservation for order, _ in self._orders.values()]
            assert all(r in orders for r in self._session.reservations.values())

    def _own_session(self) -> Session:
        if self._session is None:
            self._session = self._core.open_session("", "loans", shares_memory=False)
            self._session.between_nodes = True
        return self._session

    def _close_idle_session(self, now_s: float) -> None:
        """It would count among the clients'."""
        if self._session is not None and not self._session.reservations:
            self._core.close_session(self._session, now_s)
            self._session = None
