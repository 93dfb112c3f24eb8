"""The steps of one batch: commands are given, and what came of them is seen in the directory.

Nothing is reported: a batch is copied when the directory shows every key at a living
destination, and over when it shows none at the source. A drop is commanded only for keys
that are seen on another living node at that moment; the one exception is cache that a node
which is being emptied can leave nowhere, and of that nodes keep what somebody claims. The
command names who has the keys, and the source asks them once more: the manager notices a
death late.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from kvfabric.errors import Broken
from kvfabric.moves import sight
from kvfabric.moves.batches import Batches
from kvfabric.moves.loads import Loads
from kvfabric.moves.migration import Batch, Kind, Move, MoveState
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Key, NamespaceId, NodeId

RESEND_S = 10.0  # a command whose effect is not seen is given again
COPY_TIMEOUT_S = 60.0  # without throttling
DROP_TIMEOUT_S = 120.0  # leases end long before
DROP_LIFE_S = 20.0  # from a drop's command to the latest moment at which a node may obey it
MAX_TRIES = 4
HOLDERS = 2  # that a source may ask before it drops, where there are so many

Where = dict[Key, set[NodeId]]


class Steps:
    """See the module. Shares `loads` and `batches` with the mover that owns them."""

    def __init__(self, cluster: sight.Cluster, loads: Loads, batches: Batches) -> None:
        self._cluster = cluster
        self._loads = loads
        self._batches = batches
        self._numbers = itertools.count(1)
        self.copied: Counter[Kind] = Counter()  # shards, over all moves
        self.dropped: Counter[Kind] = Counter()

    # Copying

    def look(self, batch: Batch, now_s: float) -> None:
        """See how far it is, and command what is due. It may be over afterwards."""
        if batch.state is MoveState.COPYING:
            self._look_at_copies(batch, now_s)
        else:
            self._look_at_source(batch, now_s)

    def _look_at_copies(self, batch: Batch, now_s: float) -> None:
        destination = batch.destination
        assert destination is not None
        where = self.where(batch)
        seen = sight.live(self._cluster, destination)
        missing = {k: where[k] for k in batch.keys if not (seen and destination in where[k])}
        if missing:
            why = self._trouble(batch, missing, now_s)
            if not why:
                if now_s >= batch.due_s:
                    self._pull(batch, list(missing), now_s)
                return
            self._cluster.orders.withdraw([batch.command])
            self.elsewhere(batch, missing, now_s, why)
        self._loads.release(batch)
        batch.move.copied += len(batch.keys)
        self.copied[batch.move.kind] += len(batch.keys)
        batch.move.size_bytes += len(batch.keys) * sight.shard_bytes(self._cluster, batch.source)
        if not batch.keys:
            self.over(batch, MoveState.FAILED)
        elif batch.move.copy:
            self.over(batch, MoveState.DONE)
        else:
            self.start_dropping(batch, now_s)

    def _trouble(self, batch: Batch, missing: Where, now_s: float) -> str:
        """Why the missing keys will not come this way; empty: they may."""
        assert batch.destination is not None
        if sight.away(self._cluster, batch.destination):
            return f"{batch.destination} went away"
        if now_s >= batch.deadline_s:
            batch.shunned.add(batch.destination)
            return f"{batch.destination} did not get them from {batch.source} in time"
        if any(batch.source not in nodes for nodes in missing.values()):
            return f"{batch.source} has them no more"
        return ""

    def elsewhere(self, batch: Batch, where: Where, now_s: float, why: str) -> None:
        """These keys leave the batch; those that can still be moved are tried anew."""
        self._batches.release(batch, list(where))
        move = batch.move
        anew: dict[NodeId, list[Key]] = {}
        for key, nodes in where.items():
            if batch.source in nodes:
                anew.setdefault(batch.source, []).append(key)
            elif move.source is None and nodes:
                anew.setdefault(min(nodes), []).append(key)
            else:
                move.vanished += 1  # evicted, or lost: there is nothing left to be moved
        hopeless = (
            batch.fixed
            and batch.destination is not None
            and sight.away(self._cluster, batch.destination)
        )
        for source, keys in sorted(anew.items()):
            if hopeless or batch.tries + 1 >= MAX_TRIES:
                self.fail(batch, keys, why)
                continue
            self.again(batch, keys, source, now_s)

    def again(self, batch: Batch, keys: list[Key], source: NodeId, now_s: float) -> None:
        """These keys, which the batch has let go, wait as a batch of their own like it."""
        further = self.make(batch.move, batch.namespace, keys, source, now_s)
        further.destination = batch.destination if batch.fixed else None
        further.fixed, further.evict = batch.fixed, batch.evict
        further.may_give_up = batch.may_give_up
        further.tries = batch.tries + (batch.begun_s is not None)
        further.shunned = set() if batch.fixed else set(batch.shunned)
        if batch.begun_s is None:
            further.waiting_since_s = batch.waiting_since_s
        self._batches.wait(further)

    def _pull(self, batch: Batch, keys: list[Key], now_s: float) -> None:
        assert batch.destination is not None
        if not batch.bytes_per_s and batch.move.bytes_per_s:
            batch.bytes_per_s = max(1, batch.move.bytes_per_s // self._sharing(batch.move))
        command = control_pb2.Command(
            why=f"{batch.move.kind} {batch.move.number}",
            pull=control_pb2.Command.Pull(
                namespace_id=batch.namespace,
                keys=b"".join(keys),
                source=batch.source,
                endpoints=self._cluster.members[batch.source].endpoints,
                bytes_per_s=batch.bytes_per_s,
                priority=batch.move.priority,
                evict=batch.evict,
                move=batch.move.number,
            ),
        )
        batch.command = self._cluster.order(batch.destination, command, now_s)
        batch.due_s = now_s + RESEND_S + 2 * self.seconds(batch) if batch.command else now_s

    def seconds(self, batch: Batch) -> float:
        """How long its bytes take at the batch's share of the move's rate."""
        rate = batch.move.bytes_per_s
        return batch.size_bytes * self._sharing(batch.move) / rate if rate else 0.0

    def _sharing(self, move: Move) -> int:
        """Batches that share the move's rate."""
        return max(1, self._batches.phases(move)[1])

    # Dropping

    def start_dropping(self, batch: Batch, now_s: float) -> None:
        """All is copied, or need not be: the source is to drop its own."""
        self._batches.drop(batch)
        batch.command = 0
        batch.due_s = now_s
        batch.deadline_s = now_s + DROP_TIMEOUT_S
        self._look_at_source(batch, now_s)

    def _look_at_source(self, batch: Batch, now_s: float) -> None:
        where = self.where(batch)
        gone = [key for key in batch.keys if batch.source not in where[key]]
        batch.move.dropped += len(gone)
        self.dropped[batch.move.kind] += len(gone)
        self._batches.release(batch, gone)
        safe = [key for key in batch.keys if self._may_drop(batch, where[key])]
        # A holder that is to report anew may have them: nothing is done before it has.
        unsure = {key for key in batch.keys if self._may_have(batch, where[key])}
        bare = {key: where[key] for key in batch.keys if key not in unsure and key not in set(safe)}
        if len(safe) < len(batch.keys):
            self._cluster.orders.withdraw([batch.command])
            batch.due_s = min(batch.due_s, now_s)
        if batch.given_up and (kept := [key for key in safe if self._keepers(batch, where[key])]):
            # They lie elsewhere by now, who has them is to be asked: a batch of its own.
            self._cluster.orders.withdraw([batch.command])
            batch.due_s = min(batch.due_s, now_s)
            self._batches.release(batch, kept)
            safe = [key for key in safe if key not in set(kept)]
            self.again(batch, kept, batch.source, now_s)
        if bare:  # their copies were lost before the source let go
            batch.move.copied = max(0, batch.move.copied - len(bare))
            self.elsewhere(batch, bare, now_s, "copies were lost")
        if not batch.keys:
            self.over(batch, MoveState.DONE)
        elif now_s >= batch.deadline_s:
            why = (
                f"{batch.source} keeps its own: claimed or leased there, or it reaches "
                "nobody who has them"
            )
            self.fail(batch, batch.keys, why)
            self.over(batch, MoveState.FAILED)
        elif safe and now_s >= batch.due_s:
            self._drop(batch, safe, now_s)

    def _may_drop(self, batch: Batch, nodes: Iterable[NodeId]) -> bool:
        """Whether a key is safe without its replica at the batch's source."""
        return batch.given_up or bool(self._keepers(batch, nodes))

    def _keepers(self, batch: Batch, nodes: Iterable[NodeId]) -> set[NodeId]:
        """Those among the nodes that keep a key when its replica at the batch's source goes."""
        return {node for node in nodes if node != batch.source and sight.takes(self._cluster, node)}

    def _may_have(self, batch: Batch, nodes: Iterable[NodeId]) -> bool:
        """Whether it may turn out that it is."""
        return any(node != batch.source and not sight.away(self._cluster, node) for node in nodes)

    def _drop(self, batch: Batch, keys: Sequence[Key], now_s: float) -> None:
        """The one place that has moved shards dropped. The last good copy never is."""
        where = self.where(batch)
        for key in keys:
            if not self._may_drop(batch, where[key]):
                raise Broken(f"{batch.source} has the last good copy of {key.hex()}: a bug")
        why = f"{batch.move.kind} {batch.move.number}"
        batch.resent = batch.command != 0
        command = control_pb2.Command(
            why=f"{why}: no room elsewhere" if batch.given_up else why,
            drop=control_pb2.Command.Drop(
                namespace_id=batch.namespace,
                keys=b"".join(keys),
                cache_only=batch.given_up,
                holders=self._holders(batch, [where[key] for key in keys]),
            ),
        )
        batch.command = self._cluster.order(batch.source, command, now_s)
        batch.due_s = now_s + RESEND_S if batch.command else now_s

    def _holders(
        self, batch: Batch, places: Sequence[set[NodeId]]
    ) -> list[control_pb2.Command.Drop.Holder]:
        """Nodes of which each place has one, and a second one where there is any; best first."""
        keepers = [self._keepers(batch, nodes) for nodes in places]
        counts = Counter(node for nodes in keepers for node in nodes)
        named: list[NodeId] = []
        for node in sorted(counts, key=lambda each: (-counts[each], each)):
            left = any(not nodes.intersection(named) for nodes in keepers if nodes)
            if left or len(named) < HOLDERS:
                named.append(node)
        return [
            control_pb2.Command.Drop.Holder(
                node=node, endpoints=self._cluster.members[node].endpoints
            )
            for node in named
        ]

    # Books

    def make(
        self, move: Move, namespace: NamespaceId, keys: list[Key], source: NodeId, now_s: float
    ) -> Batch:
        """A new batch, in no books yet."""
        size_bytes = len(keys) * sight.shard_bytes(self._cluster, source)
        number = next(self._numbers)
        return Batch(number, move, namespace, keys, source, None, False, size_bytes, now_s)

    def where(self, batch: Batch) -> Where:
        """The nodes that hold each of its keys."""
        located = self._cluster.directory.locate(batch.namespace, batch.keys, prefix=False)
        nodes = [{replica.node for replica in place} for place in located.places]
        nodes.append(set())
        return {key: nodes[at] for key, at in zip(batch.keys, located.indices, strict=True)}

    def fail(self, batch: Batch, keys: Sequence[Key], why: str) -> None:
        """These keys will not be moved, and its move tells why."""
        batch.move.failed += len(keys)
        batch.move.note(why)

    def over(self, batch: Batch, state: MoveState) -> None:
        """The batch has ended; what it still wanted is called back.

        A drop that was taken already cannot be: until it is void its keys are in no new batch,
        which might count on the replica that is about to go.
        """
        if batch.command and (batch.keys or batch.resent):
            self._cluster.orders.withdraw([batch.command])
            if batch.state is MoveState.DROPPING and batch.keys:
                self._batches.linger(batch, batch.due_s + DROP_LIFE_S)
        self._loads.release(batch)
        self._batches.end(batch, state)
