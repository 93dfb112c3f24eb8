"""The machine: kernel, memory, limits, processor."""

from __future__ import annotations

import mmap
import os
import platform
import resource
import socket
from pathlib import Path

from kvfabric_client.cli.checks.finding import Finding, Level

PAGE_BYTES = mmap.PAGESIZE
# Two Ray nodes' object stores; the fabric's own memory does not lie in /dev/shm.
DEV_SHM_BYTES = 2 * 80 * 2**20
MEMORY_BYTES = 2 * 2**30
OPEN_FILES = 4096
LOCKED_BYTES = 64 * 2**20
COPY_TUNABLE = "glibc.cpu.x86_non_temporal_threshold"


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


def ports(_runtime_dir: Path) -> Finding:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        text = f"no port of 127.0.0.1 can be bound: {error}"
        return Finding("loopback", Level.BROKEN, text, "ip link set lo up")
    return Finding("loopback", Level.OK, "ports of 127.0.0.1 can be bound")


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
