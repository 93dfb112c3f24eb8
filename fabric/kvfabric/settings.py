"""Settings that processes share: where a fabric's sockets lie, and how sizes are written."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from kvfabric.errors import Refused

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 2 ** (10 * power) for power, unit in enumerate("kmgt", start=1)}
_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*$", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes from "64MiB", "1.5 GiB", "200MB" or a number. ValueError for anything else."""
    if isinstance(text, int):
        return text
    match = _SIZE.match(text)
    unit = match.group(2).lower() if match else ""
    if match is None or unit not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write it like 512MiB, 4GiB or a number of bytes")
    return int(float(match.group(1)) * _UNITS[unit])


Size = Annotated[int, BeforeValidator(parse_size)]
"""A number of bytes, in settings also as "1GiB"."""


def runtime_dir() -> Path:
    """Where this user's nodes have their sockets; see `make_runtime_dir`."""
    if chosen := os.environ.get("KVFABRIC_RUNTIME_DIR"):
        return Path(chosen)
    if xdg := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(xdg) / "kvfabric"
    return Path(f"/tmp/kvfabric-{os.getuid()}")


def make_runtime_dir(path: Path) -> Path:
    """Creates it for this user alone. Refused where it is somebody else's or open to others."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise Refused(
            f"{path} must belong to this user alone (owner {status.st_uid}, mode "
            f"{stat.S_IMODE(status.st_mode):o}); run chmod 700 on it, or set KVFABRIC_RUNTIME_DIR "
            "to a directory of your own"
        )
    return path


def host_id() -> str:
    """Equal for processes that can share memory: the boot they run under.

    KVFABRIC_HOST_ID says otherwise: for containers of one machine that share no folder.
    """
    named = os.environ.get("KVFABRIC_HOST_ID", "").encode()
    host = named or Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return hashlib.blake2b(host, digest_size=8).hexdigest()
