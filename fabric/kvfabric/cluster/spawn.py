"""The launcher as seen from `kvfabric up`: how it is started, and how it tells how far it is."""

from __future__ import annotations

import json
import os
import secrets
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from kvfabric import errors
from kvfabric.cluster import processes
from kvfabric.cluster.plan import JoinPlan, LeavePlan, Plan, to_json

LOG_NAME = "up.log"
TOKEN_NAME = "ray.token"
SILENCE_S = 120.0  # the launcher says what it does next at least this often
END_S = 20.0  # from its last word to the end of a launcher that does not stay

Report = Callable[[str], None]


def launch(
    plan: Plan, runtime_dir: Path, environment: dict[str, str], *, attached: bool
) -> subprocess.Popen[str]:
    """Starts it, in a session of its own; attached, it ends with this process."""
    with (runtime_dir / LOG_NAME).open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "kvfabric.cluster.launcher", to_json(plan)],
            env=environment,
            stdin=subprocess.PIPE if attached else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # Ctrl-C is ours to handle, in order
        )


def follow(launcher: subprocess.Popen[str], runtime_dir: Path, report: Report) -> None:
    """Passes the launcher's progress on until it is ready; raises what it failed with."""
    assert launcher.stdout is not None
    for line in _lines(launcher.stdout, SILENCE_S):
        fields = json.loads(line)
        if "step" in fields:
            report(fields["step"])
        elif "error" in fields:
            kind: type[errors.FabricError] = getattr(errors, fields["kind"], errors.Broken)
            raise kind(f"{fields['error']} (the whole story: {runtime_dir / LOG_NAME})")
        else:
            return
    raise errors.Broken(f"the launcher ended without a word: see {runtime_dir / LOG_NAME}")


def visit(plan: JoinPlan | LeavePlan, runtime_dir: Path, report: Report) -> None:
    """A launcher that does its work in a Ray of others, and ends."""
    launcher = launch(plan, runtime_dir, dict(os.environ), attached=False)
    try:
        follow(launcher, runtime_dir, report)
        launcher.wait(END_S)
    finally:
        launcher.kill()
        launcher.wait()


def ray_environment(runtime_dir: Path, mark: str) -> dict[str, str]:
    """What the launcher, and all that it starts, find in their environment.

    The user's own Ray settings belong to other Rays, and proxies to the outside: left out.
    """
    token = runtime_dir / TOKEN_NAME
    token.unlink(missing_ok=True)
    with os.fdopen(os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RAY_") and not name.lower().endswith("_proxy")
    }
    return own | {
        processes.MARK_VARIABLE: mark,
        "KVFABRIC_RUNTIME_DIR": str(runtime_dir),
        "SPT_NOENV": "1",  # else Ray's process titles overwrite the environment, and the mark
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # leaves 127.0.0.1 alone: see local_ray.py
        "RAY_enable_worker_prestart": "0",  # only actors run here
        "RAY_prestart_worker_first_driver": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # an rManager's memory is taken on purpose
    }


def _lines(stream: IO[str], silence_s: float) -> Iterator[str]:
    """The stream's lines, to its end; DeadlineExceeded when none comes for that long."""
    descriptor, text = stream.fileno(), b""
    while select.select([descriptor], [], [], silence_s)[0]:
        piece = os.read(descriptor, 65536)
        if not piece:
            return
        *whole, text = (text + piece).split(b"\n")
        yield from (line.decode() for line in whole)
    raise errors.DeadlineExceeded(f"no progress for {silence_s:g} s")
