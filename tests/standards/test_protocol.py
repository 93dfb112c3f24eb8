"""The protocol: its style, its promise to older clients, and its generated stubs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

STUBS = Path("kvfabric/rpc/v1")


def test_buf_finds_nothing(tool: Callable[..., str]) -> None:
    tool("buf", "lint", "proto")


def test_every_proto_file_is_formatted(tool: Callable[..., str]) -> None:
    tool("buf", "format", "proto", "--diff", "--exit-code")


def test_what_older_clients_speak_is_still_understood(tool: Callable[..., str]) -> None:
    tool("buf", "breaking", "proto", "--against", "proto/baseline.binpb")


def test_the_committed_stubs_are_those_of_the_proto_files(
    tool: Callable[..., str], root: Path, tmp_path: Path
) -> None:
    # --assume-old: the environment that runs this test is set up already.
    tool("make", "--assume-old=.venv/.ready", "stubs", f"STUBS_OUT={tmp_path}")

    made = {path.name: path.read_text() for path in sorted((tmp_path / STUBS).iterdir())}
    kept = {
        path.name: path.read_text() for path in sorted((root / "fabric" / STUBS).glob("*_pb2*.py*"))
    }
    differing = sorted(
        name for name in made.keys() | kept.keys() if made.get(name) != kept.get(name)
    )
    assert not differing, f"run `make stubs` and commit {differing}"
