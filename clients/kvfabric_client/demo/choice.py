"""Which engine this machine runs: vLLM where its CPU build works, else transformers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from kvfabric.errors import Unsupported
from kvfabric_client.demo.process import ENVIRONMENT, log_tail

PROBE = (
    "from vllm.platforms import current_platform; current_platform.import_kernels(); "
    "import torch; torch.ops._C.silu_and_mul; from vllm import LLM"
)
PROBE_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Choice:
    """`engine` is "vllm" or "transformers"; `reason` says why not vLLM, else it is empty."""

    engine: str
    reason: str = ""


def choose(wanted: str, log: Path, cpuinfo: Path = Path("/proc/cpuinfo")) -> Choice:
    """The engine to use. `wanted` is "auto" or an engine's name; what a probe printed is in `log`.

    Unsupported where the wanted engine cannot run here, with the reason.
    """
    if wanted == "transformers":
        return Choice("transformers")
    reason = why_not_vllm(log, cpuinfo)
    if not reason:
        return Choice("vllm")
    if wanted == "vllm":
        raise Unsupported(f"{reason}; use --engine transformers")
    return Choice("transformers", reason)


def why_not_vllm(log: Path, cpuinfo: Path) -> str:
    """The reason, or nothing where vLLM imports and has its kernels."""
    if cpuinfo.exists() and "avx2" not in _flags(cpuinfo):
        return "this processor has no AVX2, which vLLM's CPU build needs"
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (make setup installs its CPU build)"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        try:
            # In a process of its own: a kernel for another processor ends it by a signal.
            code = subprocess.run(
                [sys.executable, "-c", PROBE],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT,
                timeout=PROBE_TIMEOUT_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"vLLM did not import within {PROBE_TIMEOUT_S:.0f} s"
    return f"vLLM does not import (exit status {code}): {log_tail(log, 1)}" if code else ""


def _flags(cpuinfo: Path) -> set[str]:
    lines = cpuinfo.read_text().splitlines()
    # "Features" is what Arm calls them; there vLLM has builds that need no AVX2.
    flags = next((line for line in lines if line.startswith("flags")), "avx2")
    return set(flags.partition(":")[2].split() or flags.split())
