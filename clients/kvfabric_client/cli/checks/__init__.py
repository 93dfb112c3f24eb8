"""What a machine needs for a fabric, one function a check, in the order that doctor shows them."""

from __future__ import annotations

from kvfabric_client.cli.checks import here, machine, software
from kvfabric_client.cli.checks.finding import Check

CHECKS: tuple[Check, ...] = (
    machine.python,
    machine.shared_memory,
    machine.memory,
    machine.dev_shm,
    machine.open_files,
    machine.locked_memory,
    machine.ports,
    machine.processor,
    machine.copies,
    here.directory,
    here.leftovers,
    here.manager,
    software.ray,
    software.torch,
    software.vllm,
    software.hash_seed,
)
