"""Brings shards here from wherever they lie: from a creditor, or from where the manager says."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

from kvfabric.errors import FabricError
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Key, NamespaceId
from kvfabric_nodes.copying.puller import Puller
from kvfabric_nodes.copying.pulls import Outcome, PullOrder
from kvfabric_nodes.reporting.inquiries import Inquiries
from kvfabric_nodes.store.core import NodeCore

ATTEMPTS = 2  # replicas of a key that are tried

Whereabouts = Callable[[NamespaceId, Key], str | None]
"""The creditor that has this key for us; None: it is not on loan."""


class Homing:
    """See the module. `inquiries` None: there is no manager, and so no other node."""

    def __init__(self, core: NodeCore, puller: Puller, inquiries: Inquiries | None) -> None:
        self.whereabouts: Whereabouts = lambda namespace, key: None
        self._core = core
        self._puller = puller
        self._inquiries = inquiries
        self._ids = itertools.count(1)

    async def fetch_home(self, namespace: NamespaceId, keys: Sequence[Key]) -> list[bool]:
        """For each key, whether it is here in the end. Cancelled, it fetches no more."""
        room = self._core.shards.room
        tried: dict[Key, set[str]] = {key: set() for key in keys}
        for _ in range(ATTEMPTS):
            absent = [key for key in tried if key not in room(namespace)]
            if not absent or self._inquiries is None:
                break
            sources = await self._sources(self._inquiries, namespace, absent, tried)
            pulls = [
                self._fetch(self._inquiries, namespace, source, there)
                for source, there in sources.items()
            ]
            if not pulls:
                break
            await asyncio.gather(*pulls)
        return [key in room(namespace) for key in keys]

    async def _sources(
        self,
        inquiries: Inquiries,
        namespace: NamespaceId,
        keys: Sequence[Key],
        tried: dict[Key, set[str]],
    ) -> dict[str, list[Key]]:
        """A node for each of these keys that has not been tried yet, where there is one."""
        lent = {key: self.whereabouts(namespace, key) for key in keys}
        unknown = [key for key in keys if lent[key] in (None, *tried[key])]
        places = await inquiries.places(namespace, unknown) if unknown else []
        found = dict(zip(unknown, places or (), strict=False))
        sources: dict[str, list[Key]] = {}
        for key in keys:
            names = [name for name in (lent[key], *found.get(key, ())) if name]
            source = next((name for name in names if name not in tried[key]), None)
            if source is not None:
                tried[key].add(source)
                sources.setdefault(source, []).append(key)
        return sources

    async def _fetch(
        self, inquiries: Inquiries, namespace: NamespaceId, source: str, keys: list[Key]
    ) -> None:
        endpoints = await inquiries.endpoints(source)
        if endpoints is None:
            return
        order = PullOrder(
            id=next(self._ids),
            namespace=namespace,
            keys=tuple(keys),
            source=source,
            endpoints=endpoints,
            priority=control_pb2.PRIORITY_REPAIR,  # somebody waits for it
            origin="home",
            why="wanted here",
        )
        try:
            pulled = await self._puller.pull(order)
        except FabricError:
            return  # too many pulls wait
        if Outcome.FAILED in pulled.outcomes.values():
            inquiries.forget(source)  # it may have been started anew at another address
