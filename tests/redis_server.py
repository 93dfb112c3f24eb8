"""A real redis-server of one test's own, on a unix socket, that can be killed and come back."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import redis

START_TIMEOUT_S = 20.0


class RedisServer:
    """Keeps a log of its changes (appendfsync always) in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.address = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it answers."""
        program = shutil.which("redis-server")
        assert program, "redis-server is missing: apt-get install redis-server"
        self._process = subprocess.Popen(
            [
                program,
                *("--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder)),
                *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
            ],
            stdout=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert self._process.poll() is None, "redis-server ended at once"
                    assert time.monotonic() < deadline_s, "redis-server does not answer"
                    time.sleep(0.02)

    def kill(self) -> None:
        """As kill -9 does it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def clear(self) -> None:
        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            client.flushall()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(10)
