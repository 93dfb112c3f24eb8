"""All nodes of the fabric, as the manager listed them a while ago.

The listing is long in a large cluster: it is asked for only when somebody needs to know, and
kept for as long as he can do with an old one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from kvfabric.errors import Retry
from kvfabric.logs import guest_logger
from kvfabric.rpc.v1 import control_pb2
from kvfabric_client.deadline import Deadline

log = guest_logger(__name__)

LIST_TIMEOUT_S = 0.5  # better an old listing than a late one
VAIN_S = 5.0  # before a manager that did not answer is asked again

Infos = Mapping[str, control_pb2.NodeInfo]
"""By name."""


class Fleet:
    """See the module. Safe to share: a listing is replaced whole."""

    def __init__(
        self,
        list_nodes: Callable[[Deadline], list[control_pb2.NodeInfo]],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._list_nodes = list_nodes
        self._now = now
        self._infos: Infos = {}
        self._listed_s = float("-inf")
        self._vain_until_s = float("-inf")

    def nodes(self, deadline: Deadline, max_age_s: float) -> Infos:
        """The listing, not older than that if the manager answers; else as it was last."""
        now_s = self._now()
        if now_s - self._listed_s <= max_age_s or now_s < self._vain_until_s:
            return self._infos
        try:
            infos = self._list_nodes(Deadline(min(deadline.at_s, now_s + LIST_TIMEOUT_S)))
        except Retry as error:
            self._vain_until_s = now_s + VAIN_S
            log.debug("nodes_not_listed", why=str(error))
            return self._infos
        self._infos = {info.node: info for info in infos}
        self._listed_s = now_s
        return self._infos

    def node(self, name: str, deadline: Deadline, max_age_s: float) -> control_pb2.NodeInfo | None:
        """A node that lives, by a fresh listing where the old one does not have it."""
        info = self.nodes(deadline, max_age_s).get(name)
        if info is None or not info.alive:
            info = self.nodes(deadline, 0.0).get(name)
        return info if info is not None and info.alive else None
