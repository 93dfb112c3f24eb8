"""A node is emptied while its states are swapped, and somebody dies at every step.

No swap is lost or made twice, and nobody sees an older version after a newer one. Some of
these run with every `make test`, all of them with `make test-faults`.
"""

from __future__ import annotations

import signal
import threading
import time

import pytest
from tests.faults.conftest import ANSWER_TIMEOUT_S, SPACE, until
from tests.faults.loans.conftest import QUIET_S, Lenders

from kvfabric.errors import FabricError
from kvfabric.rpc.v1 import control_pb2
from kvfabric_client import Client
from kvfabric_client.buffers import Bytes

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

exhaustive = pytest.mark.exhaustive

NAME = "a counter"
PADDING = bytes(32 << 10)


def counted(value: Bytes | None) -> int:
    return 0 if value is None else int.from_bytes(bytes(value[:8]), "little")


class Writer:
    """Counts up a state, again and again, and looks at its version in between."""

    def __init__(self, client: Client) -> None:
        self._state = client.open(SPACE).state(NAME)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.swapped = 0  # by answers
        self.unsure = 0  # whose answers were lost
        self.versions: list[int] = []
        self.failures: list[FabricError] = []
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._state.update(lambda value: self._next(value), timeout_s=2.0)
                self.swapped += 1
                self.versions.append(self._state.version()[0])
            except FabricError as error:
                if "changed by others" in str(error):
                    continue  # nothing was swapped
                self.unsure += 1
                self.failures.append(error)
                time.sleep(0.05)

    @staticmethod
    def _next(value: Bytes | None) -> bytes:
        return (counted(value) + 1).to_bytes(8, "little") + PADDING

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(ANSWER_TIMEOUT_S)
        assert self.versions == sorted(self.versions), "an older version after a newer one"


def drain(lenders: Lenders, node: str) -> control_pb2.DrainResponse:
    with lenders.control() as stub:
        answer: control_pb2.DrainResponse = stub.Drain(
            control_pb2.DrainRequest(node=node), timeout=ANSWER_TIMEOUT_S
        )
        return answer


def begin(lenders: Lenders, *homes: str) -> list[Writer]:
    """The state is made at the east; the others find it there."""
    client = lenders.client("east")
    client.open(SPACE).state(NAME).put((0).to_bytes(8, "little"), expected=0)
    writers = [Writer(lenders.client(home)) for home in homes]
    until(lambda: all(writer.swapped > 3 for writer in writers), "all writers swap")
    return writers


def end(lenders: Lenders, writers: list[Writer], *, kept: bool = True) -> None:
    """They go on for a while; then the count is what they counted, where the state was kept."""
    seen = [writer.swapped for writer in writers]
    until(
        lambda: all(w.swapped > before + 3 for w, before in zip(writers, seen, strict=True)),
        f"all writers go on: {[writer.failures[-1:] for writer in writers]}",
        QUIET_S,
    )
    for writer in writers:
        writer.stop()
    count = counted(lenders.client("home").open(SPACE).state(NAME).get().value)
    swapped = sum(writer.swapped for writer in writers)
    assert count <= swapped + sum(writer.unsure for writer in writers)
    if kept:
        assert swapped <= count


def test_a_state_moves_while_it_is_swapped(lenders: Lenders) -> None:
    lenders.start()
    writers = begin(lenders, "home", "east", "west")

    until(lambda: drain(lenders, "east").empty, "the east is empty", QUIET_S)
    assert not [writer.failures for writer in writers if writer.failures]
    assert lenders.nodes["east"].tier().held_bytes == 0
    end(lenders, writers)
    lenders.check_quiet()


@pytest.mark.parametrize(
    ("point", "kept"),
    [
        pytest.param("state.frozen", False, marks=exhaustive),  # it ends with its node
        ("state.agreed", True),
        pytest.param("state.left", True, marks=exhaustive),
    ],
)
def test_the_source_dies(lenders: Lenders, point: str, kept: bool) -> None:
    lenders.start(east=f"{point}=kill")
    writers = begin(lenders, "home", "west")

    drain(lenders, "east")
    lenders.fallen("east")

    end(lenders, writers, kept=kept)
    lenders.check_quiet()


def test_the_destination_dies(lenders: Lenders) -> None:
    lenders.start(west="state.adopted=kill")
    writers = begin(lenders, "home", "east")

    drain(lenders, "east")
    lenders.fallen("west")

    until(lambda: drain(lenders, "east").empty, "the east is empty", QUIET_S)
    end(lenders, writers)
    lenders.check_quiet()


@exhaustive
def test_the_destination_is_stopped_and_comes_too_late(lenders: Lenders) -> None:
    """Meanwhile the state has gone to another one."""
    lenders.start(west="state.adopted=stop")
    writers = begin(lenders, "home", "east")

    drain(lenders, "east")
    lenders.stopped("west")
    until(lambda: drain(lenders, "east").empty, "the east is empty", QUIET_S)
    lenders.nodes["west"].popen.send_signal(signal.SIGCONT)

    until(lambda: "west" in lenders.alive(), "the west is back", QUIET_S)
    end(lenders, writers)
    lenders.check_quiet()


@pytest.mark.parametrize("point", ["state.frozen", "state.agreed", "state.left"])
@exhaustive
def test_the_manager_dies(lenders: Lenders, point: str) -> None:
    lenders.start(east=f"{point}=stop")
    writers = begin(lenders, "home", "west")

    drain(lenders, "east")
    lenders.stopped("east")
    lenders.restart_manager()
    lenders.nodes["east"].popen.send_signal(signal.SIGCONT)

    until(lambda: drain(lenders, "east").empty, "the east is empty", QUIET_S)
    end(lenders, writers)
    lenders.check_quiet()
