"""`python -m kvfabric_nodes`: one memory node in the foreground, without Ray.

Prints one line of JSON with its addresses once it serves; SIGTERM and SIGINT end it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from typing import Any

from google.protobuf.json_format import MessageToDict
from pydantic import ValidationError

from kvfabric import logs
from kvfabric.errors import FabricError
from kvfabric_nodes.node import Node, own_process
from kvfabric_nodes.settings import NodeSettings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvfabric_nodes", description=__doc__)
    for name, text in (
        ("node", "the node's name"),
        ("memory", "bytes of the dram tier, as in 4GiB"),
        ("segment", "bytes of a segment, the largest shard; default: a sixteenth of the memory"),
        ("runtime-dir", "where the unix socket goes"),
        ("manager", "host:port of the gManager"),
        ("tcp", "host:port of the wire"),
        ("grpc", "host:port of gRPC"),
        ("metrics", "host:port of Prometheus metrics"),
        ("lend", "bytes that other nodes may borrow in all; default: half the memory"),
        ("loan-s", "a loan that is not renewed for so long is void"),
        ("recall-s", "how long debtors have when memory is wanted back"),
        ("attention-threads", "threads that compute attention; 0: none; default: one per core"),
        ("keeper", "true: a process keeps the memory over a crash of this one (the default)"),
        ("keep-s", "for how many seconds it waits for the next start"),
        ("keep-on-stop", "true: it waits after an orderly stop, too"),
    ):
        parser.add_argument(f"--{name}", help=text)
    given = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}
    logs.configure()
    own_process()
    try:
        options: Any = given
        settings = NodeSettings(**options)
        node = Node(settings, keeper=settings.keeper)
        node.start()
    except (FabricError, ValidationError) as error:
        print(f"kvfabric node: {error}", file=sys.stderr)  # noqa: T201
        return 1
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    addresses = MessageToDict(node.endpoints, preserving_proto_field_name=True)
    line = {"node": node.settings.node, "incarnation": node.incarnation, **addresses}
    print(json.dumps(line), flush=True)  # noqa: T201
    while not done.wait(1.0) and not node.wait(0):
        pass
    node.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
