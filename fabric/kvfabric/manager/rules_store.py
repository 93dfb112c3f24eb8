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
        for prefix in (policies.POLICY_PREFIX, policies.PIN_PREFIX, policies.DRAIN_PREFIX):
            for entry in self._store.scan(prefix):
                policies.load(rules, entry.key, entry.value)

    def set_policy(self, namespace: NamespaceId | None, policy: Policy) -> None:
        self._store.put(*policies.policy_entry(namespace, policy))

    def remove_policy(self, namespace: NamespaceId | None) -> None:
        self._store.delete(policies.policy_key(namespace))

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
