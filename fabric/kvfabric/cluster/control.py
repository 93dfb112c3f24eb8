"""What an operator asks the gManager: one short gRPC call each, its failures translated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grpc

from kvfabric import errors
from kvfabric.rpc.v1 import control_pb2, control_pb2_grpc, types_pb2

Answer = TypeVar("Answer")
CALL_DEADLINE_S = 3.0

_ERRORS: dict[grpc.StatusCode, type[errors.FabricError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.Unreachable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.INVALID_ARGUMENT: errors.Refused,
    grpc.StatusCode.PERMISSION_DENIED: errors.Denied,
    grpc.StatusCode.UNAUTHENTICATED: errors.Denied,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unsupported,
}


class Control:
    """The gManager at `address` (host:port). Every call answers within `CALL_DEADLINE_S`.

    All raise Unreachable or DeadlineExceeded when it does not answer.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        # The machine's proxy settings are for the outside, not for the fabric.
        self._channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def nodes(self) -> Sequence[control_pb2.NodeInfo]:
        return self._call(self._stub.ListNodes, control_pb2.ListNodesRequest()).nodes

    def stats(self) -> control_pb2.ControlServiceStatsResponse:
        return self._call(self._stub.Stats, control_pb2.ControlServiceStatsRequest())

    def explain(self, key: bytes) -> Sequence[types_pb2.Event]:
        """What the gManager remembers of the keys that begin with `key`, oldest first."""
        request = control_pb2.ControlServiceExplainRequest(key=key)
        return self._call(self._stub.Explain, request).events

    def _call(self, method: Callable[..., Answer], request: Any) -> Answer:
        try:
            return method(request, timeout=CALL_DEADLINE_S)
        except grpc.RpcError as error:
            kind = _ERRORS.get(error.code(), errors.Broken)
            raise kind(
                f"the gManager at {self._address} did not answer "
                f"({error.code().name.lower()}: {error.details()}): "
                "see `kvfabric doctor` and `kvfabric status`"
            ) from error
