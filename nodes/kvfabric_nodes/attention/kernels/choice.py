"""Which kernel computes a work: the one that was fastest over works of the same class.

Every kernel is tried a few times; later the slower ones are tried again now and then, the more
seldom the slower they were, so that looking costs little.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from kvfabric.attention.merge import Partial
from kvfabric_nodes.attention.kernels import Kernel, Work
from kvfabric_nodes.metrics import Flow

TRIES = 3  # that count, of each kernel; one before them warms it up
LOOK_AGAIN = 100  # works of a class, times how much slower it was: costs less than 1 %
CLASSES = 4096


@dataclass(slots=True)
class _Record:
    """Of one kernel in one class."""

    runs: int = 0
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=TRIES))
    at: int = 0  # the class's work that it computed last

    @property
    def rate(self) -> float:
        return max(self.rates, default=0.0)


@dataclass(slots=True)
class _Class:
    works: int = 0
    records: dict[str, _Record] = field(default_factory=dict)


class Choice:
    """See the module; pure. A rate is KV bytes in a second: within a class works are alike."""

    def __init__(self) -> None:
        self._classes: dict[Hashable, _Class] = {}

    def pick(self, kind: Hashable, names: Sequence[str]) -> str:
        """Of these kernels, the first of which is taken where nothing speaks against it."""
        known = self._class(kind)
        known.works += 1
        if len(names) == 1:
            return names[0]
        records = {name: known.records.setdefault(name, _Record()) for name in names}
        fewest = min(records, key=lambda name: records[name].runs)
        if records[fewest].runs <= TRIES:  # in turns: what slows the machine meets all of them
            return fewest
        best = self.best(kind, names)
        for name, record in records.items():
            slower = records[best].rate / record.rate
            if name != best and known.works - record.at > LOOK_AGAIN * slower:
                return name
        return best

    def best(self, kind: Hashable, names: Sequence[str]) -> str:
        """The fastest of these; "" while some are still being tried."""
        records = self._class(kind).records
        if len(names) == 1:
            return names[0]
        if any(name not in records or records[name].runs <= TRIES for name in names):
            return ""
        return max(names, key=lambda name: records[name].rate)

    def note(self, kind: Hashable, name: str, rate: float) -> None:
        known = self._class(kind)
        record = known.records.setdefault(name, _Record())
        record.runs += 1
        record.at = known.works
        if record.runs > 1:
            record.rates.append(rate)

    def _class(self, kind: Hashable) -> _Class:
        found = self._classes.get(kind)
        if found is None:
            if len(self._classes) >= CLASSES:
                del self._classes[next(iter(self._classes))]
            found = self._classes[kind] = _Class()
        return found


def kind_of(work: Work, read_bytes: int) -> Hashable:
    """Works of one kind have one shape, and sizes within a factor of 2."""
    sizes = (work.rows.bit_length(), read_bytes.bit_length())
    return (work.shape, work.query_dtype, work.query_heads, bool(work.softcap), *sizes)


@dataclass(frozen=True, slots=True)
class Computed:
    partial: Partial
    kernel: str
    seconds: float
    read_bytes: int


class Kernels:
    """The kernels of a node, one of which computes each work.

    `measured`: in order of preference. `otherwise`: for what all of these refuse.
    """

    def __init__(
        self,
        measured: Sequence[Kernel],
        otherwise: Kernel,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._measured = {kernel.name: kernel for kernel in measured}
        self._otherwise = otherwise
        self._now = now
        self._choice = Choice()
        self.flows = {kernel.name: Flow() for kernel in (*measured, otherwise)}  # what each read

    def best(self, work: Work) -> str:
        """The kernel that is taken for such works; "" while some are still being tried."""
        able = self._able(work)
        return self._choice.best(kind_of(work, work.read_bytes), able) if able else ""

    def _able(self, work: Work) -> list[str]:
        return [name for name, kernel in self._measured.items() if not kernel.refuses(work)]

    def attend(self, work: Work) -> Computed:
        able = self._able(work)
        read_bytes = work.read_bytes
        kind = kind_of(work, read_bytes)
        kernel = self._measured[self._choice.pick(kind, able)] if able else self._otherwise
        began_s = self._now()
        partial = kernel.attend(work)
        elapsed_s = self._now() - began_s
        self.flows[kernel.name].add(read_bytes, elapsed_s)
        if able:
            self._choice.note(kind, kernel.name, read_bytes / max(elapsed_s, 1e-9))
        return Computed(partial, kernel.name, elapsed_s, read_bytes)
