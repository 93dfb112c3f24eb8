"""What the manager wants of its nodes: a queue of commands per node, taken along by heartbeats.

Commands are repeatable and finished when their effect can be seen, so nothing is kept of
one that was taken: who posted it looks at the directory, and posts it again if need be.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from kvfabric.errors import Broken
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import NodeId

MAX_WAITING = 1024  # commands per node; what is posted beyond is not taken in
MAX_PER_ANSWER = 64
MAX_ANSWER_BYTES = 512 * 1024  # of commands in one answer; a single larger one goes alone


class Orders:
    """See the module. Numbers commands from 1 in the order in which they were posted."""

    def __init__(self) -> None:
        self._waiting: dict[NodeId, dict[bytes, control_pb2.Command]] = {}
        self._ids = itertools.count(1)
        self.posted = 0  # in all
        self.refused = 0  # in all, for want of room

    def post(self, node: NodeId, command: control_pb2.Command) -> int:
        """Queue a command, which is copied. Returns its id, 0 where the queue is full.

        One that wants the same as a waiting one is that one: its id is returned.
        """
        queue = self._waiting.setdefault(node, {})
        meaning = _meaning(command)
        if meaning in queue:
            return queue[meaning].id
        if len(queue) >= MAX_WAITING:
            self.refused += 1
            return 0
        kept = control_pb2.Command()
        kept.CopyFrom(command)
        kept.id = next(self._ids)
        queue[meaning] = kept
        self.posted += 1
        return kept.id

    def take(self, node: NodeId) -> tuple[control_pb2.Command, ...]:
        """The oldest commands for a node, as many as one answer may carry. They are gone."""
        queue = self._waiting.get(node)
        if not queue:
            return ()
        taken: list[control_pb2.Command] = []
        left_bytes = MAX_ANSWER_BYTES
        for meaning, command in list(itertools.islice(queue.items(), MAX_PER_ANSWER)):
            left_bytes -= command.ByteSize()
            if taken and left_bytes < 0:
                break
            taken.append(queue.pop(meaning))
        return tuple(taken)

    def withdraw(self, ids: Iterable[int]) -> None:
        """These are no longer wanted; those already taken cannot be called back."""
        unwanted = set(ids)
        for queue in self._waiting.values():
            for meaning in [each for each, command in queue.items() if command.id in unwanted]:
                del queue[meaning]

    def forget(self, node: NodeId) -> None:
        """Nothing is wanted of this node any more."""
        self._waiting.pop(node, None)

    def waiting(self, node: NodeId) -> int:
        """Commands that the node has not taken yet."""
        return len(self._waiting.get(node, ()))

    def check(self) -> None:
        """Broken unless limits hold and no two waiting commands of a node mean the same."""
        for node, queue in self._waiting.items():
            if len(queue) > MAX_WAITING:
                raise Broken(f"{len(queue)} commands wait for {node}, over {MAX_WAITING}: a bug")
            if any(_meaning(command) != meaning for meaning, command in queue.items()):
                raise Broken(f"a command for {node} was changed after it was posted: a bug")


def _meaning(command: control_pb2.Command) -> bytes:
    """What a command wants, without its id and reason."""
    kind = command.WhichOneof("what")
    if kind is None:
        raise Broken("a command that wants nothing: a bug")
    what: bytes = getattr(command, kind).SerializeToString(deterministic=True)
    return kind.encode() + b"\0" + what
