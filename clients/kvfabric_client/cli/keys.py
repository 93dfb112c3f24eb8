"""`kvfabric explain` and `kvfabric purge`: what became of a key, and the end of some."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
