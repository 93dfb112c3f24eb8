"""`python -m kvfabric.manager`: a manager in a process of its own, until SIGTERM or SIGINT.

When it serves it prints one line of JSON: its addresses and its epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence

from pydantic import ValidationError

from kvfabric import garbage, logs
from kvfabric.errors import FabricError
from kvfabric.manager.service import ManagerServer, ManagerSettings

FENCED = 3  # exit code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs until a signal. 0: it ended as told; 2: it could not start, and said why; 3: it is
    fenced, for a newer manager was started on its store.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kvfabric.manager",
        description="What is not given is taken from KVFABRIC_MANAGER_..., else its default.",
    )
    for name, field in ManagerSettings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=f"default: {field.default!r}")
    given = vars(parser.parse_args(arguments))
    # Blocked before any thread starts, so that all of them leave these to sigwait.
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    try:
        logs.configure()
        server = ManagerServer(ManagerSettings(**given))
        server.start()
    except (FabricError, ValidationError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    garbage.collect_seldom()
    ready = {
        "manager": server.address,
        "metrics": server.metrics_address,
        "epoch": server.epoch,
        "pid": os.getpid(),
    }
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()
    threading.Thread(target=_end_if_fenced, args=(server,), daemon=True).start()
    signal.sigwait(ends)
    server.stop()
    return FENCED if server.fenced.is_set() else 0


def _end_if_fenced(server: ManagerServer) -> None:
    server.fenced.wait()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
