"""The client's side of the control plane: which nodes there are, and where keys lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from kvfabric.errors import DeadlineExceeded, FabricError, Retry, Unreachable
from kvfabric.grpc_codes import error_of
from kvfabric.rpc.v1 import control_pb2, control_pb2_grpc
from kvfabric.types import BATCH_KEYS, Key, NamespaceId, Status
from kvfabric_client.closing import Closing
from kvfabric_client.deadline import Deadline


class Manager(Closing):
    """A gRPC channel to the gManager."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(
            address,
            # The machine's proxy settings are for the outside, not for the fabric.
            options=[("grpc.max_reconnect_backoff_ms", 1000), ("grpc.enable_http_proxy", 0)],
        )
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)

    def nodes(self, deadline: Deadline) -> list[control_pb2.NodeInfo]:
        answer: control_pb2.ListNodesResponse = self._call(
            self._stub.ListNodes, control_pb2.ListNodesRequest(), deadline
        )
        return list(answer.nodes)

    def locate(self, namespace: NamespaceId, keys: Sequence[Key], deadline: Deadline) -> list[str]:
        """The best node per key; empty where no node holds it."""
        return [next(iter(nodes), "") for nodes in self.places(namespace, keys, deadline)]

    def places(
        self, namespace: NamespaceId, keys: Sequence[Key], deadline: Deadline
    ) -> list[Sequence[str]]:
        """The nodes that hold each key, best first."""
        found: list[Sequence[str]] = []
        for start in range(0, len(keys), BATCH_KEYS):
            found += self._places(namespace, keys[start : start + BATCH_KEYS], deadline)
        return found

    def _places(
        self, namespace: NamespaceId, keys: Sequence[Key], deadline: Deadline
    ) -> list[Sequence[str]]:
        request = control_pb2.LocateRequest(namespace_id=namespace, keys=keys)
        answer: control_pb2.LocateResponse = self._call(self._stub.Locate, request, deadline)
        places: list[Sequence[str]] = [place.nodes for place in answer.places]
        places.append(())
        return [places[min(index, len(places) - 1)] for index in answer.place]

    def ledger(self, deadline: Deadline) -> control_pb2.LedgerResponse:
        """Who owes whom what."""
        answer: control_pb2.LedgerResponse = self._call(
            self._stub.Ledger, control_pb2.LedgerRequest(), deadline
        )
        return answer

    def plans(self, deadline: Deadline) -> list[control_pb2.Plan]:
        """What the planner decided lately, oldest first."""
        answer: control_pb2.ListPlansResponse = self._call(
            self._stub.ListPlans, control_pb2.ListPlansRequest(), deadline
        )
        return list(answer.plans)

    def stats(self, deadline: Deadline) -> control_pb2.ControlServiceStatsResponse:
        request = control_pb2.ControlServiceStatsRequest()
        answer: control_pb2.ControlServiceStatsResponse = self._call(
            self._stub.Stats, request, deadline
        )
        return answer

    def explain(
        self, namespace: bytes, key: bytes, deadline: Deadline
    ) -> control_pb2.ControlServiceExplainResponse:
        request = control_pb2.ControlServiceExplainRequest(namespace_id=namespace, key=key)
        answer: control_pb2.ControlServiceExplainResponse = self._call(
            self._stub.Explain, request, deadline
        )
        return answer

    def migrate(
        self, request: control_pb2.MigrateRequest, deadline: Deadline
    ) -> control_pb2.MigrateResponse:
        """Begins a move. Not safe to repeat: a second call is a second move."""
        answer: control_pb2.MigrateResponse = self._call(self._stub.Migrate, request, deadline)
        return answer

    def moves(self, deadline: Deadline, number: int = 0) -> list[control_pb2.Move]:
        """One move, or (0) all that are under way or ended lately."""
        request = control_pb2.ListMovesRequest(move=number)
        answer: control_pb2.ListMovesResponse = self._call(self._stub.ListMoves, request, deadline)
        return list(answer.moves)

    def cancel_move(self, number: int, deadline: Deadline) -> None:
        self._call(self._stub.CancelMove, control_pb2.CancelMoveRequest(move=number), deadline)

    def drain(
        self, node: str, deadline: Deadline, *, bytes_per_s: int = 0, cancel: bool = False
    ) -> control_pb2.DrainResponse:
        """Has the node emptied, or says how far that is; with `cancel` it serves again."""
        request = control_pb2.DrainRequest(node=node, cancel=cancel, bytes_per_s=bytes_per_s)
        answer: control_pb2.DrainResponse = self._call(self._stub.Drain, request, deadline)
        return answer

    def set_policy(
        self, policy: control_pb2.Policy, deadline: Deadline, *, remove: bool = False
    ) -> None:
        request = control_pb2.SetPolicyRequest(policy=policy, remove=remove)
        self._call(self._stub.SetPolicy, request, deadline)

    def policies(self, deadline: Deadline) -> list[control_pb2.Policy]:
        request = control_pb2.ListPoliciesRequest()
        answer: control_pb2.ListPoliciesResponse = self._call(
            self._stub.ListPolicies, request, deadline
        )
        return list(answer.policies)

    def set_replicas(
        self, namespace: NamespaceId, keys: Sequence[Key], replicas: int, deadline: Deadline
    ) -> list[Status]:
        """Counts of their own for these keys, whatever their namespace's policy says; 0: none.

        Per key OK, or MISS where no node holds it now. Safe to repeat.
        """
        request = control_pb2.SetReplicasRequest(
            namespace_id=namespace, keys=keys, replicas=replicas
        )
        answer: control_pb2.SetReplicasResponse = self._call(
            self._stub.SetReplicas, request, deadline
        )
        return [Status(status) for status in answer.statuses]

    def replicas(self, deadline: Deadline) -> list[control_pb2.ShardReplicas]:
        """All shards that have counts of their own."""
        request = control_pb2.ListReplicasRequest()
        answer: control_pb2.ListReplicasResponse = self._call(
            self._stub.ListReplicas, request, deadline
        )
        return list(answer.counts)

    def pin(
        self,
        namespace: NamespaceId,
        keys: Sequence[Key],
        deadline: Deadline,
        *,
        unpin: bool = False,
    ) -> list[Status]:
        """Pins keys over the whole fabric: per key OK, or MISS where no node holds it now."""
        request = control_pb2.PinKeysRequest(namespace_id=namespace, keys=keys, unpin=unpin)
        answer: control_pb2.PinKeysResponse = self._call(self._stub.PinKeys, request, deadline)
        return [Status(status) for status in answer.statuses]

    def close(self) -> None:
        self._channel.close()

    def _call(self, method: Any, request: Any, deadline: Deadline) -> Any:
        try:
            return method(request, timeout=deadline.left_s())
        except grpc.RpcError as error:
            text = f"manager {self.address}: {error.details()}"
            raise error_of(error, text) or _of_grpc(error.code(), text) from error


def _of_grpc(code: grpc.StatusCode, text: str) -> FabricError:
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(text)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # too many calls are under way
        return Retry(text)
    return Unreachable(f"{text}; is the manager running? See `kvfabric status`")
