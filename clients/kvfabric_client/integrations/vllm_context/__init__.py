"""A vLLM engine whose requests may outgrow its own KV memory: their KV lies on fabric nodes, which
also attend it.

    LLM(
        ...,
        enable_prefix_caching=False,
        scheduler_cls="kvfabric_client.integrations.vllm_context.scheduler.ContextScheduler",
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVFabricContextConnector",
            kv_connector_module_path="kvfabric_client.integrations.vllm_context",
            kv_role="kv_both",
            kv_load_failure_policy="fail",
        ),
    )

Made for vLLM 0.32 on CPU. The engine keeps blocks for the tokens of a step alone, so a request is
as long as the fabric has room; what the fabric holds of its prefix is not computed. A request whose
KV is lost is computed again from there on; with vLLM's own scheduler it ends with an error, and
finds what is left of it when it is sent again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)

from kvfabric.errors import Refused
from kvfabric.types import DEFAULT_TENANT
from kvfabric_client.integrations._vllm_identity import namespace_of
from kvfabric_client.integrations.vllm_context.contexts import Contexts
from kvfabric_client.integrations.vllm_context.messages import Losses, StepRows
from kvfabric_client.integrations.vllm_context.requests import Requests
from kvfabric_client.integrations.vllm_context.rooms import Rooms
from kvfabric_client.integrations.vllm_context.served import form_of, why_not_attended

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class ContextSettings(BaseModel):
    """What `kv_connector_extra_config` may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    home: str | None = None
    """The home node ("unix:PATH", "tcp:HOST:PORT"); None finds the one on this host."""
    tenant: str = DEFAULT_TENANT
    timeout_s: float = Field(default=5.0, gt=0)
    """Of one layer's attention; a request for which it takes longer ends with an error."""
    weights_revision: str | None = Field(default=None, min_length=1)
    """A digest of the weight files or a commit id, instead of reading the files."""


class KVFabricContextConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # untyped
    """One role of one engine; the attention itself is in `backend`, which finds `contexts` here."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        """Refused where the engine would compute something else than the whole context."""
        super().__init__(vllm_config, role, kv_cache_config)
        if reason := why_not_attended(vllm_config, kv_cache_config):
            raise Refused(f"this engine's KV cannot lie on fabric nodes: {reason}")
        try:
            settings = ContextSettings.model_validate(
                vllm_config.kv_transfer_config.kv_connector_extra_config
            )
        except ValidationError as error:
            raise Refused(f"kv_connector_extra_config: {error}") from error
        form = form_of(vllm_config, kv_cache_config)
        space = namespace_of(vllm_config, form, settings.tenant, settings.weights_revision)
        rooms = Rooms(settings.home, space, settings.timeout_s)
        self.contexts: Contexts | None = None
        self._requests: Requests | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._requests = Requests(rooms, form)
        else:
            self.contexts = Contexts(rooms, form)

    def shutdown(self) -> None:
        for side in (self.contexts, self._requests):
            if side is not None:
                side.close()

    # The worker's side. The backend asks and appends, layer by layer; nothing is moved here.

    def bind_connector_metadata(self, connector_metadata: StepRows) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self.contexts is not None:
            self.contexts.begin(connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None: ...

    def wait_for_save(self) -> None: ...

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self.contexts is not None:
            self.contexts.end(finished_req_ids)
        return None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.contexts.take_failed() if self.contexts is not None else set()

    def build_connector_worker_meta(self) -> Losses | None:
        return self.contexts.take_losses() if self.contexts is not None else None

    # The scheduler's side.

    def may_begin_again(self, request_id: str) -> bool:
        """Asked by our scheduler, of a request that `get_block_ids_with_load_errors` told of."""
        assert self._requests is not None
        return self._requests.may_begin_again(request_id)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        losses = connector_output.kv_connector_worker_meta
        if isinstance(losses, Losses):
            assert self._requests is not None
            self._requests.lose(losses)

    def reset_cache(self) -> bool:
        """Called when weights change in place."""
        assert self._requests is not None
        self._requests.forget()
        return True

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        assert self._requests is not None
        return self._requests.match(request, num_computed_tokens), False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None: ...

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepRows:
        assert self._requests is not None
        return self._requests.step(scheduler_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._requests is not None
        self._requests.finished(request)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])
