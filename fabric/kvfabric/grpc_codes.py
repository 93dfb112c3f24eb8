"""The fabric's errors as gRPC's status codes, for the servers of nodes and managers alike."""

from __future__ import annotations

import grpc

from kvfabric.errors import Conflict, Denied, FabricError, Refused, Retry, Unsupported

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
