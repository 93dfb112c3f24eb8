"""Builds the native attention kernel into the source tree, from where wheels and editable installs
take it. The compiler is zig's clang, a PyPI wheel: nothing else need be installed. By hand, after a
change to the C sources: `python hatch_build.py`.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path(__file__).parent / "nodes/kvfabric_nodes/attention/kernels/native"
LIBRARY = SOURCES / "libkvfabric_attend.so"

GLIBC = "2.17"  # as old as a manylinux wheel may say, and so on every host
TARGETS = {
    "x86_64": f"x86_64-linux-gnu.{GLIBC}",
    "aarch64": f"aarch64-linux-gnu.{GLIBC}",
}
OPTIONS = ["-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-g0"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-fno-sanitize=all"]

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Files for a CPU that not every host has; which of them run is decided there.
LEVELS = {
    "avx2.c": _AVX2,
    "avx512.c": _AVX512,
    "amx.c": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


def build(target: str, library: Path = LIBRARY, extra: tuple[str, ...] = ()) -> None:
    """`target`: one of zig's; `extra`: options for the compiler and the linker, for sanitizers."""
    compiler = [sys.executable, "-m", "ziglang", "cc", f"--target={target}", *extra]
    with tempfile.TemporaryDirectory() as folder:

        def compiled(source: Path) -> str:
            made = str(Path(folder) / f"{source.stem}.o")
            options = [*OPTIONS, *WARNINGS, *LEVELS.get(source.name, [])]
            subprocess.run([*compiler, *options, "-c", str(source), "-o", made], check=True)
            return made

        x86 = target.startswith("x86_64")
        sources = [s for s in sorted(SOURCES.glob("*.c")) if x86 or s.name not in LEVELS]
        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compiled, sources))
        made = Path(folder) / library.name
        linked = [*compiler, "-shared", "-s", *objects, "-o", str(made), "-lpthread", "-lm"]
        subprocess.run(linked, check=True)
        # Whoever has the old one loaded keeps it.
        partial = library.with_suffix(".partial")
        partial.write_bytes(made.read_bytes())
        partial.rename(library)


class NativeKernel(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling before it packs a wheel or links an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        machine = platform.machine()
        if sys.platform != "linux" or machine not in TARGETS:
            self.app.display_warning(f"no native attention kernel for {sys.platform} {machine}")
            return
        build(TARGETS[machine])
        build_data["artifacts"].append(str(LIBRARY.relative_to(self.root)))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_{GLIBC.replace('.', '_')}_{machine}"


if __name__ == "__main__":
    build(TARGETS[platform.machine()])
