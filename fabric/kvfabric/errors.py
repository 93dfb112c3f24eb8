"""The fabric's errors. Each kind tells the caller what to do next.

    FabricError
    ├── Refused        the request is wrong: mend it
    │   ├── Denied     this principal may not
    │   └── Unsupported  these two versions, features or settings do not work together
    ├── Retry          not now: the same call may succeed later
    │   └── DeadlineExceeded  the answer did not come in time
    │   └── Unreachable       nobody answers there
    ├── Conflict       somebody else was first: look again
    └── Broken         an invariant is violated: a bug, or memory that lies

A miss is not an error: it is an answer, per key. Errors of foreign libraries are
translated once, where the foreign call is made.
"""

from __future__ import annotations

from kvfabric.rpc.v1 import types_pb2


class FabricError(Exception):
    """Base of all; its text says what happened and what to do about it."""

    code: types_pb2.ErrorCode.ValueType = types_pb2.ERROR_CODE_BROKEN


class Refused(FabricError):
    code = types_pb2.ERROR_CODE_REFUSED


class Denied(Refused):
    code = types_pb2.ERROR_CODE_DENIED


class Unsupported(Refused):
    code = types_pb2.ERROR_CODE_UNSUPPORTED


class Retry(FabricError):
    code = types_pb2.ERROR_CODE_RETRY


class DeadlineExceeded(Retry):
    pass


class Unreachable(Retry):
    pass


class Conflict(FabricError):
    code = types_pb2.ERROR_CODE_CONFLICT


class Broken(FabricError):
    code = types_pb2.ERROR_CODE_BROKEN


_BY_CODE: dict[int, type[FabricError]] = {
    kind.code: kind for kind in (Refused, Denied, Unsupported, Retry, Conflict, Broken)
}


def to_proto(error: FabricError) -> types_pb2.Error:
    return types_pb2.Error(code=error.code, message=str(error))


def from_proto(error: types_pb2.Error) -> FabricError:
    return _BY_CODE.get(error.code, Broken)(error.message)
