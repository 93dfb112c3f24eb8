"""Run inside the island: asks the gManager where keys lie; keys in hex on standard input."""

from __future__ import annotations

import json
import sys

from kvfabric.types import Key, NamespaceId
from kvfabric_client.deadline import Deadline
from kvfabric_client.manager import Manager

manager = Manager(sys.argv[1])
keys = [Key(bytes.fromhex(line)) for line in sys.stdin.read().split()]
names = manager.locate(NamespaceId(bytes.fromhex(sys.argv[2])), keys, Deadline.after(10))
manager.close()
sys.stdout.write(json.dumps(names))
