"""One distribution from three source roots, whose base install stays light."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Not needed, and not to be loaded, by who only imports the client.
HEAVY = ("gguf", "kvfabric_nodes", "pyarrow", "ray", "redis", "torch", "transformers", "vllm")

PACKAGES = ("kvfabric", "kvfabric_nodes", "kvfabric_client")


def test_the_wheel_holds_the_three_packages_and_nothing_else(
    tool: Callable[..., str], root: Path, tmp_path: Path
) -> None:
    tool("hatchling", "build", "--target", "wheel", "--directory", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()

    roots = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert roots == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    assert "kvfabric/rpc/v1/node_pb2.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("package", ["kvfabric_client", "kvfabric_client.cli.main"])
def test_the_client_loads_neither_ray_nor_an_engine(package: str) -> None:
    code = f"import sys, {package}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []
