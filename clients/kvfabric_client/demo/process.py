"""An engine in a process of its own, as the demo and the engine bench hold it."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from kvfabric.errors import DeadlineExceeded, FabricError
from kvfabric_client.demo.protocol import (
    Answer,
    Ask,
    EngineSpec,
    Ready,
    dump,
    load_answer,
    load_ready,
)

START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 900.0
END_TIMEOUT_S = 60.0
TAIL_LINES = 30

# One thread of computing, so that the node and the other engine have a core; no network; one
# GiB of KV. In the same process, because a second one would only add seconds to the start.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Without these glibc hands the large intermediates of a step back to the kernel or keeps
    # them, as the layout of the heap happens to be: 40,000 to 370,000 page faults a step, and
    # +-5 % of an engine's speed by chance.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}


class EngineFailed(FabricError):
    """An engine process ended or did not answer; the text has the end of its log."""


class EngineProcess:
    """Starts at once; `ready` waits for it. Leaving the context ends the process.

    Everything that the engine prints is in `log`.
    """

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        self.spec = spec
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvfabric_client.demo.engine", spec.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | ENVIRONMENT,
            )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self, timeout_s: float = START_TIMEOUT_S) -> Ready:
        return load_ready(self._line(timeout_s, "to start"))

    def generate(
        self, prompts: list[list[int]], new_tokens: int, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> Answer:
        """Answers all prompts at once; see `Ask`. EngineFailed where no answer comes."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(dump(Ask(prompts, new_tokens)))
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure("ended") from error
        return load_answer(self._line(timeout_s, "to answer"))

    def finish(self) -> None:
        """Asks the process to end, and does not wait for it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def close(self, timeout_s: float = END_TIMEOUT_S) -> None:
        """Ends the process: by the end of its input, else by force. It is gone on return."""
        self._end(timeout_s)
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error there is nothing worth waiting for.
        self.close(END_TIMEOUT_S if error is None else 0.0)

    def _end(self, timeout_s: float) -> None:
        self.finish()
        for end in (self._process.terminate, self._process.kill):
            try:
                self._process.wait(timeout_s)
                return
            except subprocess.TimeoutExpired:
                end()
                timeout_s = END_TIMEOUT_S / 10
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _line(self, timeout_s: float, what: str) -> str:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise DeadlineExceeded(
                f"the engine took over {timeout_s:.0f} s {what}; see {self._log}"
            ) from None
        if not line:
            raise self._failure("ended")
        return line

    def _failure(self, what: str) -> EngineFailed:
        self._lines.put("")  # whoever asks again is told the same
        try:
            code: int | str = self._process.wait(END_TIMEOUT_S / 10)
        except subprocess.TimeoutExpired:
            code = "none yet"
        return EngineFailed(
            f"the {self.spec.engine} engine {what} (exit status {code}); the end of {self._log}:\n"
            + log_tail(self._log)
        )


def close_all(engines: list[EngineProcess]) -> None:
    """Ends engines side by side. They are gone on return."""
    for engine in engines:
        engine.finish()
    for engine in engines:
        engine.close()


def log_tail(log: Path, lines: int = TAIL_LINES) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def wait_all_ready(engines: list[EngineProcess], timeout_s: float = START_TIMEOUT_S) -> list[Ready]:
    """Waits for engines that start side by side, within one deadline."""
    end = time.monotonic() + timeout_s
    return [engine.ready(max(0.0, end - time.monotonic())) for engine in engines]
