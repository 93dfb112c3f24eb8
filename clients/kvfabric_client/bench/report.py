"""What every bench says, in one shape: rows with their limits, and the machine they are of."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvfabric.errors import Refused
from kvfabric_client import files

BASE_PACKAGES = ("kvfabric", "numpy", "protobuf", "xxhash")
DIGITS = 6  # after the point, in JSON


class Target(Protocol):
    """What a row should reach."""

    def met(self, row: Row) -> bool: ...

    def text(self, row: Row) -> str: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One figure and the limit that it is held against; both in `unit`, `limit` above zero.

    `size_bytes` is the size of one shard, or 0 where the figure has no such thing.
    """

    name: str
    size_bytes: int
    value: float
    unit: str
    limit: float
    target: Target | None = None

    def __post_init__(self) -> None:
        if self.limit <= 0:
            raise Refused(f"the limit of {self.name!r} is {self.limit}; measure it first")

    @property
    def ratio(self) -> float:
        return self.value / self.limit

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        return None if self.target is None else self.target.met(self)

    def as_json(self) -> dict[str, str | int | float]:
        return {
            "name": self.name,
            "size_bytes": self.size_bytes,
            "value": round(self.value, DIGITS),
            "unit": self.unit,
            "limit": round(self.limit, DIGITS),
            "ratio": round(self.ratio, DIGITS),
        }


@dataclass(frozen=True, slots=True)
class AtLeast:
    """Reached when value / limit is at least `ratio`: for speeds."""

    ratio: float

    def met(self, row: Row) -> bool:
        return row.ratio >= self.ratio

    def text(self, row: Row) -> str:
        return f">= {self.ratio:.2f}"


@dataclass(frozen=True, slots=True)
class AtMost:
    """Reached when value / limit is at most `ratio`: for costs."""

    ratio: float

    def met(self, row: Row) -> bool:
        return row.ratio <= self.ratio

    def text(self, row: Row) -> str:
        return f"<= {self.ratio:.2f}"


@dataclass(frozen=True, slots=True)
class Reaches:
    """Reached when the value itself is at least `value`, in the row's unit."""

    value: float

    def met(self, row: Row) -> bool:
        return row.value >= self.value

    def text(self, row: Row) -> str:
        return f">= {self.value:g} {row.unit}"


@dataclass(frozen=True, slots=True)
class AtMostOver:
    """Reached when value - limit is at most `over`, in the row's unit: for times."""

    over: float

    def met(self, row: Row) -> bool:
        return row.value - row.limit <= self.over

    def text(self, row: Row) -> str:
        return f"over <= {self.over:g}"


@dataclass(frozen=True, slots=True)
class Report:
    """The rows of one run on one machine; `skipped` has the names of others, with the reason."""

    title: str
    rows: Sequence[Row]
    machine: dict[str, object]
    skipped: dict[str, str] = field(default_factory=dict)

    def table(self) -> Table:
        """For people: the figures, their targets, and whether those are met.

        A speed's target is of its ratio to the limit, a time's of what it is over it.
        """
        table = Table(title=self.title, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        table.add_column("name", no_wrap=True)
        for column in ("size", "value", "limit", "ratio", "over", "target"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("met", no_wrap=True)
        for row in self.rows:
            table.add_row(*_cells(row))
        if self.skipped:
            table.caption = "\n".join(f"no {name}: {why}" for name, why in self.skipped.items())
        return table

    def to_json(self) -> str:
        """For machines: {"rows": [...], "machine": {...}}, and "skipped" where there is any."""
        shape: dict[str, object] = {"rows": [row.as_json() for row in self.rows]}
        shape["machine"] = self.machine
        if self.skipped:
            shape["skipped"] = self.skipped
        return json.dumps(shape, indent=2) + "\n"

    def write_json(self, path: Path) -> None:
        """Writes `to_json`, making the folder. Refused where that cannot be written."""
        files.write(path, self.to_json(), "report")


def machine(packages: Iterable[str] = ()) -> dict[str, object]:
    """What the figures depend on. `packages`: further distributions whose versions matter."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": _versions([*BASE_PACKAGES, *packages]),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def size_text(size_bytes: int) -> str:
    """1048576 -> "1 MiB": the largest binary unit that divides it; nothing for 0."""
    if not size_bytes:
        return ""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size_bytes % (1 << power) == 0:
            return f"{size_bytes >> power} {unit}"
    return f"{size_bytes} B"


def _cells(row: Row) -> list[str]:
    over = f"{row.value - row.limit:+.3g}" if isinstance(row.target, AtMostOver) else ""
    verdict = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[row.met]
    return [
        row.name,
        size_text(row.size_bytes),
        f"{row.value:.4g} {row.unit}",
        f"{row.limit:.4g}",
        f"{row.ratio:.2f}",
        over,
        row.target.text(row) if row.target else "",
        verdict,
    ]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
