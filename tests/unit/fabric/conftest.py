"""The specification's own test vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

_VECTORS = Path(__file__).parents[3] / "proto" / "vectors.json"


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(_VECTORS.read_text(encoding="utf-8"))
    return loaded
