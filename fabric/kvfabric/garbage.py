"""When Python looks for cyclic garbage in a process whose memory is mostly records."""

from __future__ import annotations

import gc


def collect_seldom() -> None:
    """For a process that does one thing only, once it has started.

    A full collection looks at every record, of millions, and all else stands still meanwhile;
    records are freed by their reference counts, so that only rare cycles wait.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1000)
