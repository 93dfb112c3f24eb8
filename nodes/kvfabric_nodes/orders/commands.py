"""Begins what the manager wants: pulls, drops, pins, and what is for lending to decide.

Commands come again until their effect is seen, so nothing is remembered of one that could
not be carried out, and one that is being carried out already counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import structlog

from kvfabric import failpoints
from kvfabric.errors import FabricError, Refused
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import DIGEST_BYTES, Key, NamespaceId
from kvfabric_nodes.copying.puller import Puller
from kvfabric_nodes.copying.pulls import PullOrder
from kvfabric_nodes.orders.drops import NO_GROUPS, Drops, Question
from kvfabric_nodes.sequences.groups import Groups
from kvfabric_nodes.serving.handler import Handler
from kvfabric_nodes.store.promises import Session

log = structlog.get_logger(__name__)

Lend = Callable[[control_pb2.Command, int, float], None]
HandOver = Callable[[control_pb2.Command.HandOver], None]
"""Begins to hand the states of this node over."""

Told = Callable[[Question, Collection[Key], Mapping[int, int]], None]
Ask = Callable[[Question, Told], None]
"""Asks another node which keys it has; its answer is told later, or none of them: see Drops."""


class Commands:
    """See the module. On the core's thread. `lend` takes what is lending's: None, it has none;
    `hand_over` likewise for states."""

    def __init__(
        self, handler: Handler, puller: Puller, ask: Ask, groups: Groups | None = None
    ) -> None:
        self.lend: Lend | None = None
        self.hand_over: HandOver | None = None
        self.drops = Drops(handler.core, groups)
        self.on_dropped: list[Callable[[], object]] = []  # told when shards went by a command
        self._core = handler.core
        self._clock = handler.clock
        self._counts = handler.metrics.commands
        self._puller = puller
        self._ask = ask
        self._pulling: dict[
            bytes, tuple[PullOrder, int]
        ] = {}  # what is wanted: who, for which move
        self._own: Session | None = None

    def obey(self, commands: Iterable[control_pb2.Command], epoch: int) -> None:
        """Begins each of these."""
        for command in commands:
            kind = command.WhichOneof("what")
            self._counts[kind or "unknown"] += 1  # of a newer manager
            try:
                if kind == "pull":
                    self._pull(command, epoch)
                elif kind == "drop":
                    self._drop(command.drop, command.why)
                elif kind == "cancel":
                    self._cancel(command.cancel.move, epoch)
                elif kind == "pin":
                    self._pin(command.pin)
                elif kind == "hand_over":
                    if self.hand_over is not None:
                        self.hand_over(command.hand_over)
                elif kind and self.lend is not None:
                    self.lend(command, epoch, self._clock.now())
            except FabricError as error:
                log.warning("command_failed", kind=kind, command=command.id, why=str(error))
        self.tick(self._clock.now())

    def registered(self) -> None:
        """The node has registered, maybe with another manager: what waits is dropped no more.

        Who wanted it may not know that it waits, and count on the replica.
        """
        self.drops.clear()

    def tick(self, now_s: float) -> None:
        """Goes on with what waits to be dropped."""
        self._tell(self.drops.tick(now_s))
        self._ask_holders()

    def _answered(
        self, question: Question, held: Collection[Key], groups: Mapping[int, int] = NO_GROUPS
    ) -> None:
        self._tell(self.drops.answered(question, held, self._clock.now(), groups))
        self._ask_holders()

    def _ask_holders(self) -> None:
        questions, self.drops.questions = self.drops.questions, []
        for question in questions:
            self._ask(question, self._answered)

    def _pull(self, command: control_pb2.Command, epoch: int) -> None:
        wanted = command.pull
        meaning = wanted.SerializeToString(deterministic=True)
        if meaning in self._pulling:
            return
        order = PullOrder(
            id=command.id,
            namespace=NamespaceId(wanted.namespace_id),
            keys=tuple(_cut(wanted.keys)),
            source=wanted.source,
            endpoints=wanted.endpoints,
            bytes_per_s=wanted.bytes_per_s,
            priority=wanted.priority or control_pb2.PRIORITY_MOVE,
            evict=wanted.evict,
            origin=_origin(epoch),
            why=command.why,
        )
        self._puller.begin(order, lambda _: self._pulling.pop(meaning, None))
        self._pulling[meaning] = (order, wanted.move)

    def _cancel(self, move: int, epoch: int) -> None:
        """Ends the pulls for a move of this epoch's manager."""
        for order, wanted_by in list(self._pulling.values()):
            if wanted_by == move and order.origin == _origin(epoch):
                self._puller.cancel(order.origin, order.id)

    def _drop(self, wanted: control_pb2.Command.Drop, why: str) -> None:
        failpoints.reach("drop.told")
        if not (wanted.holders or wanted.cache_only):
            raise Refused("nobody is named who has what is to be dropped")
        self.drops.begin(
            NamespaceId(wanted.namespace_id),
            tuple(_cut(wanted.keys)),
            wanted.holders,
            "drained" if wanted.cache_only else "moved",
            why,
            self._clock.now(),
        )

    def _pin(self, wanted: control_pb2.Command.Pin) -> None:
        if self._own is None:
            self._own = self._core.open_session("", "the manager", shares_memory=False)
            self._own.between_nodes = True
        namespace, keys = NamespaceId(wanted.namespace_id), list(_cut(wanted.keys))
        batch = self._core.limits.batch_keys
        for start in range(0, len(keys), batch):
            part = keys[start : start + batch]
            if wanted.pinned:
                self._core.pin(self._own, namespace, part)
            else:
                self._core.unpin(self._own, namespace, part, self._clock.now())

    def _tell(self, dropped: bool) -> None:
        if dropped:
            for told in self.on_dropped:
                told()


def _origin(epoch: int) -> str:
    """Whose orders these are: a manager's, who numbers its commands and moves."""
    return f"command of epoch {epoch}"


def _cut(packed: bytes) -> Iterable[Key]:
    """The keys of a packed field. Refused where it cannot be one."""
    if len(packed) % DIGEST_BYTES:
        raise Refused(f"{len(packed)} bytes of keys are no multiple of {DIGEST_BYTES}")
    return (
        Key(packed[start : start + DIGEST_BYTES]) for start in range(0, len(packed), DIGEST_BYTES)
    )
