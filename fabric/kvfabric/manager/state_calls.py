"""FindState of ControlService."""

from __future__ import annotations

from typing import Any

from kvfabric.errors import Refused
from kvfabric.manager import messages
from kvfabric.manager.calls import Calls, translated
from kvfabric.rpc.v1 import control_pb2
from kvfabric.types import DIGEST_BYTES


class StateCalls(Calls):
    """See the module."""

    def FindState(  # noqa: N802
        self, request: control_pb2.FindStateRequest, context: Any
    ) -> control_pb2.FindStateResponse:
        with translated(context):
            if len(request.name) != DIGEST_BYTES:
                raise Refused(f"a state's name of {len(request.name)} bytes; it has {DIGEST_BYTES}")
            name = (messages.namespace_id(request.namespace_id), request.name)
            asker = messages.node_id(request.node)
            with self._lock:
                found = self._core.moving.heads.find(
                    name, asker, self._clock.now(), create=request.create
                )
        return control_pb2.FindStateResponse(node=found or "", unsure=found is None)
