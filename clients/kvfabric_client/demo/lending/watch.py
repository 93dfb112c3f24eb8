"""Tells loans and moves as they happen: looks at the manager's books and prints what changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kvfabric.errors import FabricError
from kvfabric.rpc.v1 import control_pb2
from kvfabric_client.deadline import Deadline
from kvfabric_client.manager import Manager
from kvfabric_client.texts import size

LOOK_S = 0.25
CALL_S = 2.0
STEP_BYTES = 32 << 20  # a loan that grew by so much is worth a line

ENDED = (
    control_pb2.MOVE_STATE_DONE,
    control_pb2.MOVE_STATE_CANCELLED,
    control_pb2.MOVE_STATE_FAILED,
)


class Watch:
    """Looks from a thread of its own while its context lasts."""

    def __init__(self, manager: Manager, tell: Callable[[str], None]) -> None:
        self._manager = manager
        self._tell = tell
        self._lent: dict[tuple[str, str], int] = {}
        self._moves: dict[int, int] = {}  # the last state told
        self._ending = threading.Event()
        self._since_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="demo-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(LOOK_S):
            try:
                self._loans(self._manager.ledger(Deadline.after(CALL_S)).lent)
                self._look_at_moves(self._manager.moves(Deadline.after(CALL_S)))
            except FabricError as error:
                self._say(f"[yellow]the manager does not answer: {error}[/]")

    def _loans(self, loans: control_pb2.Loans) -> None:
        now: dict[tuple[str, str], int] = {}
        for debtor, creditor, held in zip(
            loans.debtor, loans.creditor, loans.size_bytes, strict=True
        ):
            now[debtor, creditor] = now.get((debtor, creditor), 0) + held
        for pair in sorted(now.keys() | self._lent.keys()):
            before, after = self._lent.get(pair, 0), now.get(pair, 0)
            if before == after or (before and after and abs(after - before) < STEP_BYTES):
                continue
            self._lent[pair] = after
            debtor, creditor = pair
            if after > before:
                self._say(f"loan   {creditor} lends {debtor} [bold]{size(after)}[/]")
            else:
                self._say(f"loan   {debtor} owes {creditor} [bold]{size(after)}[/] still")

    def _look_at_moves(self, moves: list[control_pb2.Move]) -> None:
        for move in moves:
            if self._moves.get(move.move) == move.state:
                continue
            self._moves[move.move] = move.state
            name = control_pb2.MoveState.Name(move.state).removeprefix("MOVE_STATE_").lower()
            where = f"{move.source or 'several'} -> {move.destination or 'several'}"
            why = f", {move.why}" if move.state in ENDED and move.why else ""
            self._say(f"move   {move.kind} {where}: {name}, {move.copied}/{move.keys} copied{why}")

    def _say(self, text: str) -> None:
        self._tell(f"[dim]{time.monotonic() - self._since_s:6.1f} s[/]  {text}")
