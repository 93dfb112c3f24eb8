"""Files that commands write beside what they print."""

from __future__ import annotations

from pathlib import Path

from kvfabric.errors import Refused


def write(path: Path, text: str, what: str) -> None:
    """Makes the folder, too. Refused, with `what` it is, where that cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise Refused(f"cannot write the {what} to {path}: {error.strerror}") from error
