"""What a check says."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class Level(enum.StrEnum):
    """How much a finding matters."""

    OK = "ok"
    HINT = "hint"  # works; could be better, or concerns a part that is not used here
    BROKEN = "broken"  # the fabric cannot work like this


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check saw; the remedy is empty where nothing needs one."""

    name: str
    level: Level
    text: str
    remedy: str = ""


Check = Callable[[Path], Finding]
"""Looks at one thing, given the runtime directory; changes nothing."""
