"""The rules in the MetadataStore: read at the start, written before a change takes effect."""

from __future__ import annotations

from collections.abc import Iterable

from kvfabric.moves import policies
from kvfabric.moves.policies import Drain, Policy, Rules
from kvfabric.stores import MetadataStore
from kvfabric.types import Key, NamespaceId, NodeId


class RulesStore:
    """Every call may raise Retry while the store is away; then nothing, or a part, was done.

    All may be repeated. What was written in part is read at the next start, as far as it went.
    """

    def __init__(self, store: MetadataStore) -> None:
        self._store = store

    def load(self, rules: Rules) -> None:
        """Everything into empty rules. Broken for an entry that is none."""
        for prefix in policies.PREFIXES:
            for entry in self._store.scan(prefix):
                policies.load(rules, entry.key, entry.value)

    def set_policy(self, namespace: NamespaceId | None, policy: Policy) -> None:
        self._store.put(*policies.policy_entry(namespace, policy))

    def remove_policy(self, namespace: NamespaceId | None) -> None:
        self._store.delete(policies.policy_key(namespace))

    def set_replicas(self, namespace: NamespaceId, keys: Iterable[Key], replicas: int) -> None:
        """0: they have no count of their own any more."""
        for key in keys:
            if replicas:
                self._store.put(*policies.count_entry(namespace, key, replicas))
            else:
                self._store.delete(policies.count_key(namespace, key))

    def pin(self, namespace: NamespaceId, keys: Iterable[Key]) -> None:
        for key in keys:
            self._store.put(policies.pin_key(namespace, key), b"")

    def unpin(self, namespace: NamespaceId, keys: Iterable[Key]) -> None:
        for key in keys:
            self._store.delete(policies.pin_key(namespace, key))

    def drain(self, node: NodeId, drain: Drain) -> None:
        self._store.put(*policies.drain_entry(node, drain))

    def end_drain(self, node: NodeId) -> None:
        self._store.delete(policies.drain_key(node))
