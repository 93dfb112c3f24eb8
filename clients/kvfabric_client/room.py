"""A room: all that a client does within one namespace. Batches answer per key."""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kvfabric.errors import Refused
from kvfabric.logs import guest_logger
from kvfabric.rpc.v1 import node_pb2, types_pb2
from kvfabric.types import Format, Key, Status, Tier
from kvfabric_client import shm
from kvfabric_client.answers import Match, Run, View
from kvfabric_client.attention.bank import Bank, blocks_of
from kvfabric_client.blocks import shape_of
from kvfabric_client.buffers import Bytes, Pieces
from kvfabric_client.deadline import Deadline
from kvfabric_client.group import Group, open_group
from kvfabric_client.handoff import HandOff, hand_off
from kvfabric_client.link import Link
from kvfabric_client.outline import Outline, checked_ids
from kvfabric_client.sequence import Sequence
from kvfabric_client.sequence_opening import Opening
from kvfabric_client.sequence_writer import Writer
from kvfabric_client.state import State
from kvfabric_client.transfers import Transfers, batches

if TYPE_CHECKING:
    pass

log = guest_logger(__name__)

T = TypeVar("T")

IDLE_S = 60.0  # how long a sequence lives after its writer was heard of last
GROUP_LIFE_S = 600.0
HOLD_S = 30.0


class Room(Transfers):
    """See the module. Made by `Client.open`."""

    def match(
        self, keys: abc.Sequence[Key], *, local_only: bool = False, timeout_s: float | None = None
    ) -> Match:
        """The longest prefix of `keys` that the fabric holds (the home node, if `local_only`)."""
        deadline = self.client.deadline(timeout_s)
        matched, runs = 0, list[Run]()
        for batch in batches(len(keys)):
            request = node_pb2.MatchRequest(
                namespace_id=self.id, keys=keys[batch], local_only=local_only
            )
            answer = self._call("match", request, deadline).match_response
            runs += [Run(run.count, run.node, Tier(run.tier)) for run in answer.runs]
            matched += answer.matched
            if matched < batch.stop:
                break
        return Match(matched, tuple(runs))

    def put(
        self,
        keys: abc.Sequence[Key],
        buffers: abc.Sequence[Any],
        *,
        parents: abc.Sequence[Key | None] | None = None,
        layers: int = 1,
        ttl_s: float = 0.0,
        at: str = "",
        timeout_s: float | None = None,
    ) -> list[Status]:
        """Stores shards: OK = sealed, EXISTS = was there, REFUSED and RETRY = not stored.

        `buffers[i]`: contiguous bytes, or a list of such that are stored one behind the
        other (one per layer, say). `layers`: equal layer parts of each shard, each with
        checksums of its own. `parents[i]`: the key before it in its chain. `ttl_s`: life
        after the commit; 0: until evicted. `at`: the address of a node other than the home.
        """
        deadline = self.client.deadline(timeout_s)
        sources = _pieces(keys, buffers)
        statuses: list[Status] = []
        for batch in batches(len(keys)):
            some = parents[batch] if parents else None
            statuses += self.store(keys[batch], sources[batch], some, layers, ttl_s, deadline, at)
        return statuses

    def get_into(
        self,
        keys: abc.Sequence[Key],
        buffers: abc.Sequence[Any],
        *,
        verify: bool = True,
        at: str = "",
        timeout_s: float | None = None,
    ) -> list[Status]:
        """Copies shards into `buffers` (as in `put`, writable): OK or MISS per key.

        `at`: the address of a node that is asked before any other. A shard of another size than
        its buffers is a miss. Where the status is MISS, the buffers' content is undefined. After
        a return or a raise nothing writes to them.
        """
        deadline = self.client.deadline(timeout_s)
        targets = _pieces(keys, buffers, writable=True)
        return self.load(
            keys,
            lambda index, size: targets[index] if targets[index].size_bytes == size else None,
            deadline,
            verify=verify,
            at=at,
        )

    def get(
        self,
        keys: abc.Sequence[Key],
        *,
        verify: bool = True,
        at: str = "",
        timeout_s: float | None = None,
    ) -> list[Bytes | None]:
        """Copies of shards; None: a miss. `at`: as in `get_into`."""
        copies: list[Bytes | None] = [None] * len(keys)

        def target(index: int, size_bytes: int) -> Pieces:
            copies[index] = array = np.empty(size_bytes, dtype=np.uint8)
            return Pieces(array)

        deadline = self.client.deadline(timeout_s)
        statuses = self.load(keys, target, deadline, verify=verify, at=at)
        return [
            copy if status is Status.OK else None
            for copy, status in zip(copies, statuses, strict=True)
        ]

    def view(
        self, keys: abc.Sequence[Key], *, lease_s: float = 30.0, timeout_s: float | None = None
    ) -> View:
        """Leased views of shards, for a `with` statement; not to be touched after its end.

        Without a copy where the home node shares its memory; what lies elsewhere is copied
        (and verified: a view itself is not).
        """
        deadline = self.client.deadline(timeout_s)

        def hold(link: Link) -> View:
            link.open(self.namespace, self.id, deadline.at_s)
            if not link.shares_memory:
                return View(self.client, link, shm.Held(0, [None] * len(keys), (), (), 0.0))
            held = shm.acquire(link, self.id, keys, lease_s, deadline, checked=False)
            return View(self.client, link, held)

        view = self.client.at_home(hold, deadline)
        missing = [index for index, place in enumerate(view) if place is None]
        if missing:
            try:
                some = [keys[index] for index in missing]
                left_s = deadline.left_s()
                for index, copy in zip(missing, self.get(some, timeout_s=left_s), strict=True):
                    view.add_copy(index, copy)
            except BaseException:
                view.release()
                raise
        return view

    def sequence(
        self,
        form: Format | None = None,
        *,
        tokens: Any = (),
        size_bytes: int = 0,
        layers: int = 0,
        block_tokens: int = 0,
        first_layer: int = 0,
        first_head: int = 0,
        heads: int = 0,
        at: str = "",
        idle_s: float = IDLE_S,
        timeout_s: float | None = None,
    ) -> Sequence:
        """Opens a sequence, for a `with` statement: one request's context, to be appended to.

        `form`: a plain format; `layers` and `heads` (with the first of each) are those that
        this rank has, by default all. Without it, or for another packing, give `size_bytes` and
        `block_tokens` of a block: such blocks are appended and read whole. `tokens`: ids that
        the context begins with; its full blocks that the fabric holds need not be appended, and
        `length` says how far that goes. `at`: the address of the node that is to be its home, by
        default the first that takes it. `idle_s`: how long it lives after its writer is gone.
        """
        shape = shape_of(
            form,
            size_bytes=size_bytes,
            layers=layers,
            block_tokens=block_tokens,
            first_layer=first_layer,
            first_head=first_head,
            heads=heads,
        )
        ids = checked_ids(tokens)
        outline = Outline(self.id, shape)
        blocks = outline.named(ids)
        opening = Opening(self, shape, blocks, idle_s)
        deadline = self.client.deadline(timeout_s)
        home, length = opening.at(at, deadline) if at else opening.anywhere(deadline)
        outline.begin([block for block in blocks if block.end <= length], ids[:length])
        return Sequence(Writer(self, outline, home))

    def bank(
        self,
        form: Format,
        keys: abc.Sequence[Key],
        *,
        first_tokens: abc.Sequence[int] | None = None,
        tokens: abc.Sequence[int] | None = None,
        value_dim: int = 0,
    ) -> Bank:
        """Shards of a plain format, wherever they lie, to be searched and summed there.

        `first_tokens`: the absolute position of each one's first token, by default one behind
        the other; `tokens` of each, by default as many as a full one has. A bank of plain
        vectors is best put as latents: of kind "mla", each [layers, tokens, head dim].
        """
        shape = shape_of(form)
        return Bank(self, shape, blocks_of(shape, keys, first_tokens, tokens), value_dim)

    def group(
        self,
        chains: abc.Sequence[abc.Sequence[Key]],
        *,
        life_s: float = GROUP_LIFE_S,
        timeout_s: float | None = None,
    ) -> Group:
        """Keeps what the requests of a batch share, for a `with` statement: every key that two
        or more of these chains have stays until the group is closed, or `life_s` is over."""
        return open_group(self, chains, life_s, self.client.deadline(timeout_s))

    def state(self, name: str | bytes, *, at: str = "") -> State:
        """A versioned value under a name, at the home node or the one at the address `at`."""
        return State(self, name, at)

    def hand_off(
        self, keys: abc.Sequence[Key], *, hold_s: float = HOLD_S, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Tells another process what the home node has of this chain: a JSON-able dict for `take`.

        Names the longest prefix of the keys that is sealed there, which stays for `hold_s`.
        """
        return hand_off(self, keys, hold_s, self.client.deadline(timeout_s)).as_dict()

    def take(
        self,
        given: Mapping[str, Any],
        buffers: abc.Sequence[Any],
        *,
        verify: bool = True,
        timeout_s: float | None = None,
    ) -> list[Status]:
        """Copies what was handed off into `buffers`, one per key, as `get_into`.

        The node that was named is asked at once, whether or not a manager knows of it already.
        Refused where it is of another namespace.
        """
        offer = HandOff.of(given, self.id)
        deadline = self.client.deadline(timeout_s)
        at = offer.address(self.client, deadline)
        left_s = deadline.left_s()
        return self.get_into(offer.keys, buffers, verify=verify, at=at, timeout_s=left_s)

    def address_of(self, node: str, *, timeout_s: float | None = None) -> str:
        """How this process reaches the node of this name, for `at`. Empty: nobody knows it."""
        return self.client.address_of(node, self.client.deadline(timeout_s))

    def pin(self, keys: abc.Sequence[Key], *, timeout_s: float | None = None) -> list[Status]:
        """Keeps shards of the home node until unpinned: OK or MISS per key. Where a shard is
        moved to, its pin goes along."""
        request = node_pb2.PinRequest(namespace_id=self.id, keys=keys)
        answer = self._call("pin", request, self.client.deadline(timeout_s))
        return [Status(status) for status in answer.pin_response.statuses]

    def unpin(self, keys: abc.Sequence[Key], *, timeout_s: float | None = None) -> list[Status]:
        """Ends pins, of what the home node does not have where it lies: OK or MISS per key."""
        deadline = self.client.deadline(timeout_s)
        request = node_pb2.UnpinRequest(namespace_id=self.id, keys=keys)
        answer = self._call("unpin", request, deadline)
        statuses = [Status(status) for status in answer.unpin_response.statuses]
        moved = [index for index, status in enumerate(statuses) if status is Status.MISS]
        if moved:
            some = [keys[index] for index in moved]
            for address, places in self.client.elsewhere(self.id, some, deadline).items():
                there = [moved[place] for place in places]
                verdicts = self._unpin_at(address, [keys[index] for index in there], deadline)
                for index, verdict in zip(there, verdicts, strict=True):
                    statuses[index] = verdict
        return statuses

    def _unpin_at(self, address: str, keys: abc.Sequence[Key], deadline: Deadline) -> list[Status]:
        request = node_pb2.UnpinRequest(namespace_id=self.id, keys=keys)

        def call(link: Link) -> Any:
            link.open(self.namespace, self.id, deadline.at_s)
            return link.call("unpin", request, deadline.at_s)

        answer = self.client.at(address, call, deadline)
        return [Status(status) for status in answer.unpin_response.statuses]

    def purge(
        self, keys: abc.Sequence[Key] = (), *, owner: str = "", timeout_s: float | None = None
    ) -> tuple[int, int]:
        """Erases at the home node: (shards, bytes). No keys: the whole namespace."""
        request = node_pb2.PurgeRequest(namespace_id=self.id, keys=keys, owner=owner)
        answer = self._call("purge", request, self.client.deadline(timeout_s)).purge_response
        return answer.shards, answer.size_bytes

    def explain(self, key: Key, *, timeout_s: float | None = None) -> list[types_pb2.Event]:
        """What the home node remembers of a key's life, oldest first."""
        request = node_pb2.ExplainRequest(namespace_id=self.id, key=key)
        answer = self._call("explain", request, self.client.deadline(timeout_s))
        return list(answer.explain_response.events)

    def _call(self, name: str, request: Any, deadline: Deadline) -> Any:
        def call(link: Link) -> Any:
            link.open(self.namespace, self.id, deadline.at_s)
            return link.call(name, request, deadline.at_s)

        return self.client.at_home(call, deadline)


def _pieces(
    keys: abc.Sequence[Key], buffers: abc.Sequence[Any], *, writable: bool = False
) -> list[Pieces]:
    if len(keys) != len(buffers):
        raise Refused(f"{len(keys)} keys with {len(buffers)} buffers; give one per key")
    return [Pieces(buffer, writable=writable) for buffer in buffers]
