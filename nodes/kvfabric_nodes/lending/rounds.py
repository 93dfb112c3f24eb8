"""One search for creditors: whom the manager names, in its order, and who has refused.

Those that refused because they owe themselves are asked again at the end, as the last
resort.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from kvfabric.rpc.v1 import control_pb2, types_pb2
from kvfabric_nodes.lending.post import Post

ROUND_S = 5.0  # then what the manager said is too old
CREDITORS = 64  # tried in one round


@dataclass(slots=True)
class Offer:
    """A node that may lend, as last heard."""

    node: str
    endpoints: types_pb2.Endpoints
    free_bytes: int
    last_resort: bool = False


class Round:
    """See the module. `barred` are never asked, and the `shy` after all others."""

    def __init__(
        self,
        post: Post,
        barred: Collection[str],
        now_s: float,
        shy: Collection[str] = (),
        named: Offer | None = None,
    ) -> None:
        """With a `named` creditor that one is asked, and nobody else."""
        self.begun_s = now_s
        self.reason = ""  # why nobody is left, or why the last one refused
        self._post = post
        self._barred = frozenset(barred)
        self._shy = frozenset(shy)
        self._offers: list[Offer] = [named] if named else []
        self._tried: dict[str, Offer] = {}  # as the manager named them
        self._owing: dict[str, Offer] = {}
        self._asking = False
        self._empty = named is not None  # the manager knows nobody else
        self._last_resort = False

    def old(self, now_s: float) -> bool:
        return not self._asking and now_s >= self.begun_s + ROUND_S

    def offer(self, size_bytes: int, now_s: float) -> Offer | None:
        """Whom to ask next; None: nobody, or nobody yet."""
        if self._offers:
            return self._offers[0]
        if self._asking:
            return None
        if not self._empty and len(self._tried) < CREDITORS:
            self._ask(size_bytes, now_s)
            return None
        if self._owing and not self._last_resort:
            self._last_resort = True
            self._offers = [replace(o, last_resort=True) for o in self._owing.values()]
            return self._offers[0]
        return None

    @property
    def exhausted(self) -> bool:
        """Nobody is left to ask."""
        may_ask = not self._empty and len(self._tried) < CREDITORS
        may_beg = bool(self._owing) and not self._last_resort
        return not (self._offers or self._asking or may_ask or may_beg)

    def has_others(self, node: str) -> bool:
        """Whether somebody else may lend, as far as is known."""
        return any(offer.node != node for offer in self._offers)

    def used(self, node: str, size_bytes: int) -> None:
        """So much was asked of it; a node without more is not asked again."""
        for offer in self._offers:
            if offer.node == node:
                offer.free_bytes -= size_bytes
        self._offers = [o for o in self._offers if o.free_bytes > 0 or o.node != node]

    def refused(self, node: str, why: str, owes: bool) -> None:
        """It lends nothing more now; in no hurry to be right: another round asks again."""
        self.reason = why
        if owes and node in self._tried:
            self._owing[node] = self._tried[node]
        self._offers = [o for o in self._offers if o.node != node]

    def _ask(self, size_bytes: int, now_s: float) -> None:
        self._asking = True
        exclude = sorted({*self._barred, *self._tried})
        self._post.creditors(size_bytes, exclude, self._answer, now_s)

    def _answer(self, answer: control_pb2.BorrowResponse | None, why: str, now_s: float) -> None:
        self._asking = False
        if answer is None:
            self.reason = f"the manager does not say who could lend: {why}"
            self._empty = True
        else:
            columns = zip(answer.nodes, answer.endpoints, answer.free_bytes, strict=False)
            for node, endpoints, free_bytes in columns:
                if node not in self._barred and node not in self._tried:
                    offer = Offer(node, endpoints, max(free_bytes, 1))
                    self._tried[node] = offer
                    self._offers.append(replace(offer))
            self._offers.sort(key=lambda offer: offer.node in self._shy)
            self._empty = not self._offers
            if self._empty:
                self.reason = self.reason or answer.reason or "no node has memory to lend"
