"""An engine of this demo in a process of its own, as the demo holds it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvfabric.errors import Broken
from kvfabric_client.children import line_of
from kvfabric_client.demo.attention.protocol import Order, Report, Spec, dump, load_report
from kvfabric_client.demo.process import log_tail

ANSWER_TIMEOUT_S = 900.0
END_TIMEOUT_S = 20.0
# Named another host than the nodes' own: nodes are reached by TCP, and none of their memory is
# mapped. One thread of computing, so that the nodes have a core.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "KVFABRIC_HOST_ID": "the engine's",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Child:
    """Answers orders one by one. Broken, with the end of its log, where it does not."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        self.ready = self._report()

    def obey(self, order: Order) -> Report:
        assert self._process.stdin is not None
        self._process.stdin.write(dump(order) + "\n")
        self._process.stdin.flush()
        return self._report()

    def _report(self) -> Report:
        line = line_of(self._process, ANSWER_TIMEOUT_S)
        if not line:
            raise Broken(f"an engine ended; the end of {self._log}:\n{log_tail(self._log)}")
        return load_report(line)


@contextmanager
def engine(spec: Spec, log: Path) -> Iterator[Child]:
    """Ready, until the context is left; then its process is gone."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvfabric_client.demo.attention.engine", dump(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
    with process:  # closes its pipes and waits, in the end
        try:
            yield Child(process, log)
        except BaseException:
            process.kill()
            raise
        watchdog = threading.Timer(END_TIMEOUT_S, process.kill)
        watchdog.start()
        process.communicate()
        watchdog.cancel()
