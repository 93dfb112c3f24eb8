"""Rules about single shards: a bounded number of keys, each with what is said of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from kvfabric.errors import Broken, Refused
from kvfabric.types import Key, NamespaceId

Said = TypeVar("Said")


class Keyed(Generic[Said]):
    """See the module. The calls that change something are safe to repeat."""

    def __init__(self, limit: int, what: str, remedy: str) -> None:
        """What too many keys are told: `limit` of them `what` already, and the remedy."""
        self._limit = limit
        self._what = what
        self._remedy = remedy
        self._rooms: dict[NamespaceId, dict[Key, Said]] = {}
        self._count = 0

    def say(self, namespace: NamespaceId, keys: Iterable[Key], said: Said) -> None:
        """Refused, and nothing is changed, where there would be too many."""
        keys = dict.fromkeys(keys)
        new = self.check_room(namespace, keys)
        if keys:
            self._rooms.setdefault(namespace, {}).update(dict.fromkeys(keys, said))
        self._count += new

    def check_room(self, namespace: NamespaceId, keys: Iterable[Key]) -> int:
        """How many of these different keys are new. Refused where there would be too many."""
        room = self._rooms.get(namespace, {})
        new = sum(key not in room for key in keys)
        if self._count + new > self._limit:
            raise Refused(
                f"{self._count} keys {self._what} already, the limit is {self._limit}; "
                f"{self._remedy}"
            )
        return new

    def forget(self, namespace: NamespaceId, keys: Iterable[Key]) -> None:
        room = self._rooms.get(namespace, {})
        self._count -= sum(room.pop(key, None) is not None for key in dict.fromkeys(keys))
        if not room:
            self._rooms.pop(namespace, None)

    def get(self, namespace: NamespaceId, key: Key) -> Said | None:
        return self._rooms.get(namespace, {}).get(key)

    def any_in(self, namespace: NamespaceId) -> bool:
        """Whether something is said of any key of the namespace."""
        return namespace in self._rooms

    def __contains__(self, subject: tuple[NamespaceId, Key]) -> bool:
        namespace, key = subject
        return key in self._rooms.get(namespace, ())

    def __iter__(self) -> Iterator[tuple[NamespaceId, Key, Said]]:
        return (
            (namespace, key, said)
            for namespace, room in self._rooms.items()
            for key, said in room.items()
        )

    def __len__(self) -> int:
        return self._count

    def check(self) -> None:
        """Broken unless it is counted right, within its limit, and nothing is None."""
        counted = sum(said is not None for room in self._rooms.values() for said in room.values())
        if counted != self._count or counted > self._limit or not all(self._rooms.values()):
            raise Broken(f"{self._count} keyed rules are counted, {counted} are there: a bug")
