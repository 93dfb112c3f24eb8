"""States: a small value under a name, replaced only by whoever knows the current version.

The value is an immutable shard, so that a reader's snapshot stays what it was; the name's head
points to it. A state lives at one node; its handle goes after it where it is moved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvfabric.errors import Conflict, DeadlineExceeded, Refused, Retry, Unreachable
from kvfabric.keys import content_key
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import DIGEST_BYTES, Key, Status
from kvfabric_client.buffers import Bytes, flat
from kvfabric_client.deadline import Deadline
from kvfabric_client.link import Link

if TYPE_CHECKING:
    from kvfabric_client.room import Room

MAX_TRIES = 16  # of an update, against other writers
PUT_TRIES = 10  # of a value that another is writing at the same time
PUT_PAUSE_S = 0.002
PAUSE_S = 0.01  # before a state that is on its way is asked for again; twice as long each time
MOST_PAUSE_S = 0.25


class StateConflict(Conflict):
    """Somebody else was first. `version` and `key` are the state's now."""

    def __init__(self, name: bytes, expected: int, version: int, key: Key) -> None:
        super().__init__(
            f"state {name.hex()[:16]} is at version {version}, not {expected}; read it again"
        )
        self.version = version
        self.key = key


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state at one version. Version 0: there is none yet, `value` is None."""

    version: int
    key: Key
    value: Bytes | None


class State:
    """Made by `Room.state`. Thread-safe: it holds the name, and where the state was last."""

    def __init__(self, room: Room, name: str | bytes, at: str = "") -> None:
        """A text, or bytes that are not 32, are hashed within the namespace."""
        raw = name.encode() if isinstance(name, str) else name
        hashed = isinstance(name, str) or len(raw) != DIGEST_BYTES
        self.name: bytes = content_key(room.id, raw) if hashed else raw
        self._room = room
        self._first = at  # where it is looked for while nothing else is known
        self._at = at

    def version(self, *, timeout_s: float | None = None) -> tuple[int, Key]:
        """(version, key of its shard); (0, b"") where there is none."""
        answer = self._read(self._room.client.deadline(timeout_s))
        return answer.version, Key(answer.key)

    def get(self, *, timeout_s: float | None = None) -> Snapshot:
        """The current value, in memory of its own. Retry where its shard is lost."""
        deadline = self._room.client.deadline(timeout_s)
        for _ in range(MAX_TRIES):
            head = self._read(deadline)
            if not head.key:
                return Snapshot(head.version, Key(b""), None)
            at, left_s = self._at, deadline.left_s()
            (value,) = self._room.get([Key(head.key)], at=at, timeout_s=left_s)
            if value is not None:
                return Snapshot(head.version, Key(head.key), value)
            if self._read(deadline).version == head.version and self._at == at:
                break  # else it was replaced or moved meanwhile
        raise Retry(f"the value of state {self.name.hex()[:16]} is lost; put it again")

    def swap(self, expected: int, key: Key | None, *, timeout_s: float | None = None) -> int:
        """Points the name to another shard of its node (None: removes it) if its version is the
        one expected (0: there is none yet); answers the new one. StateConflict otherwise."""
        request = node_pb2.SwapStateRequest(
            namespace_id=self._room.id, name=self.name, expected_version=expected, key=key or b""
        )
        answer: node_pb2.SwapStateResponse = self._call(
            "swap_state", request, self._room.client.deadline(timeout_s)
        )
        if not answer.swapped:
            raise StateConflict(self.name, expected, answer.version, Key(answer.key))
        return answer.version

    def put(
        self, value: Any, *, expected: int, layers: int = 1, timeout_s: float | None = None
    ) -> int:
        """Stores bytes as a shard that is named by its content, and swaps the head to it.

        Answers the new version. Retry where there is no room for it.
        """
        deadline = self._room.client.deadline(timeout_s)
        content = flat(value)
        key = content_key(self._room.id, content.data)
        tries = 0
        while True:
            self._store(key, content, layers, deadline)
            try:
                return self.swap(expected, key, timeout_s=deadline.left_s())
            except Refused:  # another was writing the same value, or it or the state is elsewhere
                tries += 1
                if tries > PUT_TRIES:
                    raise
                time.sleep(PUT_PAUSE_S * tries)

    def _store(self, key: Key, content: Bytes, layers: int, deadline: Deadline) -> None:
        """Puts the value where the state is. A node that is being emptied takes nothing: it is
        waited for until it has handed the state over."""
        pauses = _Pauses(deadline)
        while True:
            at, left_s = self._at, deadline.left_s()
            try:
                (status,) = self._room.put([key], [content], layers=layers, at=at, timeout_s=left_s)
                if status in (Status.OK, Status.EXISTS):
                    return
                failure = Retry(f"{len(content)} bytes of a state were not stored: {status.name}")
                if status is Status.REFUSED:
                    raise failure
            except Unreachable as error:
                failure = error
            self._read(deadline)  # it may have been moved
            if self._at == at and not pauses.take():
                raise failure

    def update(
        self, change: Callable[[Bytes | None], Any], *, timeout_s: float | None = None
    ) -> int:
        """Reads, changes and puts, again after each conflict; answers the new version."""
        deadline = self._room.client.deadline(timeout_s)
        for _ in range(MAX_TRIES):
            now = self.get(timeout_s=deadline.left_s())
            try:
                fresh = change(now.value)
                return self.put(fresh, expected=now.version, timeout_s=deadline.left_s())
            except StateConflict:
                deadline.check()
        raise Retry(f"state {self.name.hex()[:16]} was changed by others {MAX_TRIES} times")

    def _read(self, deadline: Deadline) -> node_pb2.ReadStateResponse:
        request = node_pb2.ReadStateRequest(namespace_id=self._room.id, name=self.name)
        answer: node_pb2.ReadStateResponse = self._call("read_state", request, deadline)
        return answer

    def _call(self, name: str, request: Any, deadline: Deadline) -> Any:
        """Asks the node that has the state, wherever it has gone."""
        pauses, before = _Pauses(deadline), ""
        while True:
            try:
                answer = self._ask(name, request, self._at, deadline)
                if not answer.node:
                    return answer
                there = self._address(answer.node, deadline)
                if there == before:
                    raise Retry(f"state {self.name.hex()[:16]} is on its way to node {answer.node}")
                before, self._at = self._at, there
            except _Away as error:
                self._look_elsewhere(error, deadline)
                if not pauses.take():
                    raise
            except (Unreachable, DeadlineExceeded):
                raise
            except Retry:  # it is on its way, or it is not known yet where it is
                if not pauses.take():
                    raise

    def _ask(self, name: str, request: Any, at: str, deadline: Deadline) -> Any:
        """The answer of the node at this address, or of the home node. A swap is sent once at
        most: _Away where it was not."""
        room, swap, sent = self._room, name == "swap_state", False

        def call(link: Link) -> Any:
            nonlocal sent
            link.open(room.namespace, room.id, deadline.at_s)
            if swap and sent:
                raise DeadlineExceeded(
                    f"the answer to a swap of state {self.name.hex()[:16]} was lost; read the "
                    "state to see what became of it"
                )
            sent = True
            return getattr(link.call(name, request, deadline.at_s), f"{name}_response")

        try:
            return room.with_node(at, call, deadline)
        except Unreachable as error:
            if swap and sent:
                raise
            raise _Away(str(error)) from error

    def _look_elsewhere(self, failure: _Away, deadline: Deadline) -> None:
        """Nobody answers where it was: the home node may know where it is, or come to know."""
        if not self._at:
            raise failure
        request = node_pb2.ReadStateRequest(namespace_id=self._room.id, name=self.name)
        try:
            said = self._ask("read_state", request, "", deadline)
            there = self._address(said.node, deadline) if said.node else ""
        except (Unreachable, DeadlineExceeded):
            raise
        except Retry:
            return
        if there or said.version:
            self._at = there
        elif self._at != self._first:  # it has ended with that node
            self._at = self._first
        else:
            raise failure

    def _address(self, node: str, deadline: Deadline) -> str:
        address = self._room.client.address_of(node, deadline)
        if not address:
            raise Retry(
                f"state {self.name.hex()[:16]} is at node {node}, and nobody says how to reach it"
            )
        return address


class _Away(Unreachable):
    """No node was asked."""


class _Pauses:
    """Ever longer ones, within a deadline."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._next_s = PAUSE_S

    def take(self) -> bool:
        """Pauses; False, and at once, where the deadline would be over."""
        if self._deadline.left_s() <= self._next_s:
            return False
        time.sleep(self._next_s)
        self._next_s = min(MOST_PAUSE_S, 2 * self._next_s)
        return True
