"""Errors keep their kind and their text on the way through the protocol."""

from __future__ import annotations

import pytest

from kvfabric import errors
from kvfabric.rpc.v1 import types_pb2

CODES = [value for value in types_pb2.ErrorCode.values() if value]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.Refused("a"), errors.Refused),
        (errors.Denied("b"), errors.Denied),
        (errors.Unsupported("c"), errors.Unsupported),
        (errors.Retry("d"), errors.Retry),
        (errors.DeadlineExceeded("e"), errors.Retry),
        (errors.Unreachable("f"), errors.Retry),
        (errors.Conflict("g"), errors.Conflict),
        (errors.Broken("h"), errors.Broken),
    ],
)
def test_an_error_arrives_as_the_kind_that_says_what_to_do(
    error: errors.FabricError, kind: type[errors.FabricError]
) -> None:
    raw = errors.to_proto(error).SerializeToString()
    arrived = errors.from_proto(types_pb2.Error.FromString(raw))
    assert type(arrived) is kind
    assert str(arrived) == str(error)


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_a_kind_of_its_own(code: types_pb2.ErrorCode.ValueType) -> None:
    assert errors.from_proto(types_pb2.Error(code=code)).code == code


@pytest.mark.parametrize("code", [0, 999])
def test_a_code_that_is_not_known_means_broken(code: int) -> None:
    assert type(errors.from_proto(types_pb2.Error(code=code, message="?"))) is errors.Broken
