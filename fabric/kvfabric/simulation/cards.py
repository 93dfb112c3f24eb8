"""Network cards, which carry one payload at a time.

None stands idle while a payload waits for it whose other end is free, too: the one that has
waited longest is next, and one for a busy partner is overtaken. Real cards share; they do not
stand idle for a busy partner either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvfabric.simulation.engine import Simulation


@dataclass(frozen=True, slots=True, eq=False)
class Payload:
    """Waits for the cards of both ends, or has them."""

    ends: tuple[str, str]
    takes_s: float
    sent: Callable[[], object]


class Cards:
    """See the module. A card has its node's name, and outlives the node's death."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._busy: set[str] = set()
        self._waiting: dict[str, dict[Payload, None]] = {}  # by card, in the order of asking

    def carry(self, source: str, target: str, takes_s: float, sent: Callable[[], object]) -> None:
        """Calls `sent` once both cards have been busy with this payload for so long."""
        payload = Payload((source, target), takes_s, sent)
        for card in payload.ends:
            self._waiting.setdefault(card, {})[payload] = None
        self._turn(source)

    def _turn(self, card: str) -> None:
        """Begins with the first payload that waits for this card and can have both."""
        if card in self._busy:
            return
        waiting = self._waiting[card]
        payload = next((each for each in waiting if self._busy.isdisjoint(each.ends)), None)
        if payload is None:
            return
        for end in payload.ends:
            self._waiting[end].pop(payload, None)
            self._busy.add(end)
        self._simulation.after(payload.takes_s, self._carried, payload)

    def _carried(self, payload: Payload) -> None:
        self._busy.difference_update(payload.ends)
        payload.sent()
        for card in payload.ends:
            self._turn(card)
