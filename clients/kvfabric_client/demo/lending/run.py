"""The story: grow, read, drain a creditor, copy, kill another one, read again; compare it all."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import numpy as np

from kvfabric.errors import DeadlineExceeded
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import Namespace, NamespaceId
from kvfabric_client.client import Client, connect
from kvfabric_client.deadline import Deadline
from kvfabric_client.demo.cluster import Cluster, cluster
from kvfabric_client.demo.lending.context import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    FORMAT,
    TOKEN_BYTES,
    Context,
)
from kvfabric_client.demo.lending.result import Holding, Reading, Result
from kvfabric_client.demo.lending.watch import Watch
from kvfabric_client.demo.steps import Steps
from kvfabric_client.manager import Manager
from kvfabric_client.sequence import Sequence

HOME = "home"
LENDERS = ("east", "west", "south")
APPEND_TOKENS = 4 * BLOCK_TOKENS
READ_TOKENS = 16 * BLOCK_TOKENS
CALL_S = 5.0
APPEND_S = 30.0  # room may have to be borrowed first
DRAIN_S = 120.0
COPIES_S = 120.0
LOST_S = 30.0
LOOK_S = 0.1
# What a lender may lend is half of its memory: three of them hold the sequence, and so do two.
LENDER_SHARE = 1.2
DRAINED, KILLED = LENDERS[0], LENDERS[2]


def run(times_home: int, home_bytes: int, logs: Path, steps: Steps) -> Result:
    """Runs the demo. Its processes are gone on return."""
    sequence_bytes = times_home * home_bytes
    lender_bytes = int(sequence_bytes * LENDER_SHARE) // BLOCK_BYTES * BLOCK_BYTES
    result = Result(home_bytes=home_bytes)
    with contextlib.ExitStack() as stack:
        with steps.step("a gManager and four memory nodes, each a process"):
            memory = {HOME: home_bytes} | dict.fromkeys(LENDERS, lender_bytes)
            starting = cluster(memory, BLOCK_BYTES, logs)
            fabric = stack.enter_context(starting)
        manager = stack.enter_context(Manager(fabric.manager))
        client = stack.enter_context(connect(fabric.unix(HOME), timeout_s=APPEND_S))
        stack.enter_context(Watch(manager, steps.note))
        _Story(fabric, client, manager, steps, result).tell(sequence_bytes)
    return result


class _Story:
    def __init__(
        self, fabric: Cluster, client: Client, manager: Manager, steps: Steps, result: Result
    ) -> None:
        self._fabric = fabric
        self._client = client
        self._manager = manager
        self._steps = steps
        self._result = result
        self._context = Context(seed=1)

    def tell(self, sequence_bytes: int) -> None:
        space = Namespace("default", bytes(32), b"demo lending")
        room = self._client.open(space)
        self._see("before")
        with room.sequence(FORMAT) as sequence:
            self._grow(sequence, sequence_bytes // TOKEN_BYTES)
            self._see("grown")
            self._read(sequence, "after it grew")
            self._drain()
            self._see(f"{DRAINED} drained")
            self._read(sequence, f"after {DRAINED} was drained")
            self._copy(room.id, sequence)
            self._kill()
            self._see(f"{KILLED} killed")
            self._read(sequence, f"after {KILLED} was killed")
            self._result.books = self._books()

    def _grow(self, sequence: Sequence, tokens: int) -> None:
        with self._steps.step(f"{HOME} takes in {tokens:,} tokens") as step:
            for start in range(0, tokens, APPEND_TOKENS):
                end = min(start + APPEND_TOKENS, tokens)
                ids, kv = self._context.token_ids(start, end), self._context.kv(start, end)
                begun_s = time.monotonic()
                sequence.append(ids, kv)
                self._result.append_s += time.monotonic() - begun_s
            self._result.tokens = sequence.length
            self._result.sequence_bytes = sequence.length * TOKEN_BYTES
            step.result = f"{self._result.times_home:.1f} x its memory"

    def _read(self, sequence: Sequence, when: str) -> None:
        right = wrong = missing = 0
        seconds = 0.0
        with self._steps.step(f"everything is read back {when}") as step:
            for start in range(0, self._result.tokens, READ_TOKENS):
                end = min(start + READ_TOKENS, self._result.tokens)
                target = np.empty_like(expected := self._context.kv(start, end))
                begun_s = time.monotonic()
                lacking = sequence.read_into(target, start, end)
                seconds += time.monotonic() - begun_s
                here = np.ones(end - start, dtype=bool)
                for tokens in lacking:
                    here[tokens.start - start : tokens.stop - start] = False
                same = (target == expected).all(axis=(0, 1, 2, 4))
                right += int((here & same).sum())
                wrong += int((here & ~same).sum())
                missing += int((~here).sum())
            size_bytes = self._result.tokens * TOKEN_BYTES
            reading = Reading(when, right, wrong, missing, seconds, size_bytes)
            self._result.readings.append(reading)
            step.result = f"{reading.gigabytes_per_s:.2f} GB/s, {wrong} wrong, {missing} missing"

    def _drain(self) -> None:
        with self._steps.step(f"{DRAINED} is drained while the sequence is in use") as step:
            begun_s = time.monotonic()
            while True:
                answer = self._manager.drain(DRAINED, Deadline.after(CALL_S))
                if answer.empty:
                    break
                if time.monotonic() - begun_s > DRAIN_S:
                    raise DeadlineExceeded(
                        f"{DRAINED} is not empty after {DRAIN_S:g} s: it waits for {answer.waiting}"
                    )
                time.sleep(LOOK_S)
            self._result.drained_in_s = time.monotonic() - begun_s
            step.result = "it may be deleted"

    def _copy(self, namespace: NamespaceId, sequence: Sequence) -> None:
        """A second replica of all, so that a loss costs nothing."""
        keys = [place.key for place in sequence.blocks() if place.key is not None]
        with self._steps.step("a second replica of every block is made") as step:
            policy = control_pb2.Policy(namespace_id=namespace, replicas=2)
            self._manager.set_policy(policy, Deadline.after(CALL_S))
            begun_s = time.monotonic()
            while True:
                places = self._manager.places(namespace, keys, Deadline.after(CALL_S))
                copied = sum(len(set(place)) >= 2 for place in places)
                if copied == len(keys):
                    break
                if time.monotonic() - begun_s > COPIES_S:
                    raise DeadlineExceeded(
                        f"{copied} of {len(keys)} blocks have two replicas after {COPIES_S:g} s"
                    )
                time.sleep(LOOK_S)
            step.result = f"{len(keys)} blocks"

    def _kill(self) -> None:
        with self._steps.step(f"{KILLED} is killed"):
            self._fabric.nodes[KILLED].kill()
            end_s = time.monotonic() + LOST_S
            while any(info.alive for info in self._infos() if info.node == KILLED):
                if time.monotonic() > end_s:
                    raise DeadlineExceeded(f"nobody noticed for {LOST_S:g} s that {KILLED} is gone")
                time.sleep(LOOK_S)

    def _books(self) -> tuple[int, int]:
        """What is lent and borrowed, once both sides have said the same or time is over."""
        end_s = time.monotonic() + LOST_S
        while True:
            ledger = self._manager.ledger(Deadline.after(CALL_S))
            if ledger.lent_bytes == ledger.borrowed_bytes or time.monotonic() > end_s:
                return ledger.lent_bytes, ledger.borrowed_bytes
            time.sleep(LOOK_S)

    def _see(self, moment: str) -> None:
        self._books()  # heartbeats have told of everything then
        holdings = {info.node: Holding.of(info) for info in self._infos()}
        self._result.holdings[moment] = {name: holdings[name] for name in (HOME, *LENDERS)}

    def _infos(self) -> list[control_pb2.NodeInfo]:
        return self._manager.nodes(Deadline.after(CALL_S))
