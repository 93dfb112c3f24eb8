"""What a manager answers reaches its client as the error that it is, with its text."""

from __future__ import annotations

import contextlib

import pytest
from tests.unit.client.conftest import Start, address
from tests.unit.client.test_outgrown import manager, wait_for

import kvfabric_client
from kvfabric.errors import FabricError, Refused, Retry, Unreachable
from kvfabric.manager.service import ManagerServer
from kvfabric.moves import mover
from kvfabric.rpc.v1 import control_pb2
from kvfabric_client.deadline import Deadline
from kvfabric_client.manager import Manager

__all__ = ["manager"]  # fixture

ALL_OF_EAST = control_pb2.MigrateRequest(source="east")


def migrated(address: str) -> FabricError:
    """Why a move did not begin."""
    with contextlib.closing(Manager(address)) as control, pytest.raises(FabricError) as failure:
        control.migrate(ALL_OF_EAST, Deadline.after(10))
    return failure.value


def test_a_move_too_many_is_to_be_asked_for_later(
    manager: ManagerServer, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start("east", manager=manager.address)
    with kvfabric_client.connect(address(node, "unix")) as client:
        wait_for(lambda: [info.node for info in client.nodes()] == ["east"])
    monkeypatch.setattr(mover, "MAX_MOVES", 0)

    error = migrated(manager.address)

    assert type(error) is Retry
    assert str(error).endswith("0 moves are under way; cancel one, or wait for an end")


def test_what_is_refused_says_why(manager: ManagerServer) -> None:
    error = migrated(manager.address)
    assert type(error) is Refused
    assert "east is no node that is alive" in str(error)


def test_a_manager_that_is_away_is_unreachable() -> None:
    error = migrated("127.0.0.1:1")
    assert type(error) is Unreachable
    assert "is the manager running?" in str(error)
