"""The bench's own child processes, which say with one line of JSON that they are ready."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

from kvfabric.errors import Unreachable
from kvfabric_client.children import line_of
from kvfabric_client.closing import Closing

END_TIMEOUT_S = 10.0


class Child(Closing):
    """`python -m MODULE ARGS`, in the bench's environment, so with the same settings.

    `within`: the command that runs it, for a place of its own.

    `ready` is the object that the child printed as its first line. Leaving the context
    ends the child: it has END_TIMEOUT_S from SIGTERM on to end by itself.
    """

    def __init__(
        self,
        module: str,
        *args: str,
        start_timeout_s: float = 60.0,
        within: Sequence[str] = (),
    ) -> None:
        self._name = module
        self._process = subprocess.Popen(
            [*within, sys.executable, "-m", module, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.ready = self._first_line(start_timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        self._stream(self._process.stdin).close()
        self._process.terminate()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stream(self._process.stdout).close()

    def _first_line(self, timeout_s: float) -> dict[str, object]:
        line = line_of(self._process, timeout_s)
        try:
            ready = json.loads(line)
        except json.JSONDecodeError as error:
            raise Unreachable(
                f"{self._name} did not start within {timeout_s:g} s; run "
                f"`python -m {self._name}` to see why"
            ) from error
        if not isinstance(ready, dict):
            raise Unreachable(f"{self._name} began with {line!r} instead of a JSON object")
        return ready

    @staticmethod
    def _stream(stream: IO[str] | None) -> IO[str]:
        assert stream is not None  # both were asked for as pipes
        return stream
