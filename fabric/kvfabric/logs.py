"""Logging of every process of ours: structlog on stderr, JSON where nobody watches.

A cause id, bound by `cause`, is in every line that is logged inside it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import structlog

from kvfabric.errors import Refused

LEVEL_VARIABLE = "KVFABRIC_LOG_LEVEL"


def configure(level: str | None = None) -> None:
    """Set up logging for this process; may be repeated, the last call counts.

    `level` is a name such as "debug"; None takes it from KVFABRIC_LOG_LEVEL, else
    "info". Refused for a name that does not exist.
    """
    name = (level or os.environ.get(LEVEL_VARIABLE) or "info").upper()
    number = logging.getLevelNamesMapping().get(name)
    if number is None:
        raise Refused(
            f"{LEVEL_VARIABLE}={name.lower()} is not a level; take debug, info, warning or error"
        )
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer()
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def logger(**values: object) -> structlog.typing.FilteringBoundLogger:
    """A logger whose every line carries `values`. Call it as log.info("what", key=value)."""
    return cast(structlog.typing.FilteringBoundLogger, structlog.get_logger(**values))


def guest_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger for code in somebody else's process, the SDK's: lines go to the standard
    library's logging, which that process configures as it likes.
    """
    return cast(
        structlog.stdlib.BoundLogger,
        structlog.wrap_logger(
            logging.getLogger(name),
            processors=[
                structlog.stdlib.filter_by_level,
                structlog.contextvars.merge_contextvars,
                structlog.processors.KeyValueRenderer(key_order=["event"]),
            ],
            wrapper_class=structlog.stdlib.BoundLogger,
        ),
    )


@contextmanager
def cause(identifier: str) -> Iterator[None]:
    """Bind `cause` to every line logged by this thread or task inside the block."""
    with structlog.contextvars.bound_contextvars(cause=identifier):
        yield
