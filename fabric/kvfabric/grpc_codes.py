"""The fabric's errors as gRPC's statuses: how servers of nodes and managers say them, and how a
caller tells them from gRPC's own."""

from __future__ import annotations

from typing import Any

import grpc

from kvfabric.errors import Conflict, Denied, FabricError, Refused, Retry, Unsupported, from_proto
from kvfabric.rpc.v1 import types_pb2

ERROR_METADATA = "kvfabric-error"  # trailing: the code's name; a status without it is gRPC's own
_PREFIX = "ERROR_CODE_"

_CODES: tuple[tuple[type[FabricError], grpc.StatusCode], ...] = (
    (Denied, grpc.StatusCode.PERMISSION_DENIED),
    (Unsupported, grpc.StatusCode.FAILED_PRECONDITION),
    (Refused, grpc.StatusCode.INVALID_ARGUMENT),
    (Retry, grpc.StatusCode.UNAVAILABLE),
    (Conflict, grpc.StatusCode.ABORTED),
    (FabricError, grpc.StatusCode.INTERNAL),
)


def code_of(error: FabricError) -> grpc.StatusCode:
    return next(code for kind, code in _CODES if isinstance(error, kind))


def metadata_of(error: FabricError) -> tuple[tuple[str, str], ...]:
    """Goes behind the status."""
    return ((ERROR_METADATA, types_pb2.ErrorCode.Name(error.code).removeprefix(_PREFIX)),)


def error_of(failed: Any, text: str) -> FabricError | None:
    """What a failed call's server said, with this text; None: it is gRPC that failed."""
    name = dict(failed.trailing_metadata() or ()).get(ERROR_METADATA)
    if name is None:
        return None
    code = types_pb2.ErrorCode.DESCRIPTOR.values_by_name.get(f"{_PREFIX}{name}")
    return from_proto(types_pb2.Error(code=code.number if code else 0, message=text))
