"""Carries out what the manager wants: pulls, drops, pins, and what is for lending to decide.

Commands come again until their effect is seen, so nothing is remembered of one that could
not be carried out, and one that is being carried out already counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import structlog

from kvfabric import failpoints
from kvfabric.errors import FabricError, Refused
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import DIGEST_BYTES, Key, NamespaceId
from kvfabric_nodes.handler import Handler
from kvfabric_nodes.promises import Session
from kvfabric_nodes.puller import Puller
from kvfabric_nodes.pulls import PullOrder
from kvfabric_nodes.shards import Shard

log = structlog.get_logger(__name__)

MAX_DROPS = 65_536  # shards that wait for their leases to end
DROP_S = 15.0  # then a drop is forgotten: if it is still wanted, it comes again

Lend = Callable[[control_pb2.Command, int, float], None]


class Commands:
    """See the module. On the core's thread. `lend` takes what is lending's: None, it has none."""

    def __init__(self, handler: Handler, puller: Puller) -> None:
        self.lend: Lend | None = None
        self.on_dropped: list[Callable[[], object]] = []  # told when shards went by a command
        self._core = handler.core
        self._clock = handler.clock
        self._counts = handler.metrics.commands
        self._puller = puller
        self._pulling: set[bytes] = set()  # what is wanted by pulls that are at work
        self._dropping: dict[Shard, tuple[str, str, float]] = {}  # what, why, until when
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
                elif kind == "pin":
                    self._pin(command.pin)
                elif kind and self.lend is not None:
                    self.lend(command, epoch, self._clock.now())
            except FabricError as error:
                log.warning("command_failed", kind=kind, command=command.id, why=str(error))

    def registered(self) -> None:
        """The node has registered, maybe with another manager: what waits is dropped no more.

        Who wanted it may not know that it waits, and count on the replica.
        """
        self._dropping.clear()

    def tick(self, now_s: float) -> None:
        """Drops what nobody leases any more."""
        if not self._dropping:
            return
        dropped = False
        for shard, (what, why, until_s) in list(self._dropping.items()):
            if not shard.present or self._needed(shard) or until_s <= now_s:
                del self._dropping[shard]
            elif not shard.extent.holders:
                del self._dropping[shard]
                self._core.drop(shard, what, why, now_s)
                dropped = True
        self._tell(dropped)

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
            origin=f"command of epoch {epoch}",
            why=command.why,
        )
        self._puller.begin(order, lambda _: self._pulling.discard(meaning))
        self._pulling.add(meaning)

    def _drop(self, wanted: control_pb2.Command.Drop, why: str) -> None:
        failpoints.reach("drop.told")
        now_s = self._clock.now()
        what = "drained" if wanted.cache_only else "moved"
        room = self._core.shards.room(NamespaceId(wanted.namespace_id))
        dropped = False
        for key in _cut(wanted.keys):
            shard = room.get(key)
            if shard is None or self._needed(shard):
                continue
            if not shard.extent.holders:
                self._core.drop(shard, what, why, now_s)
                dropped = True
            elif len(self._dropping) < MAX_DROPS:
                self._dropping[shard] = (what, why, now_s + DROP_S)
        self._tell(dropped)

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

    def _needed(self, shard: Shard) -> bool:
        return shard.pinned or self._core.shards.claimed(shard)

    def _tell(self, dropped: bool) -> None:
        if dropped:
            for told in self.on_dropped:
                told()


def _cut(packed: bytes) -> Iterable[Key]:
    """The keys of a packed field. Refused where it cannot be one."""
    if len(packed) % DIGEST_BYTES:
        raise Refused(f"{len(packed)} bytes of keys are no multiple of {DIGEST_BYTES}")
    return (
        Key(packed[start : start + DIGEST_BYTES]) for start in range(0, len(packed), DIGEST_BYTES)
    )
