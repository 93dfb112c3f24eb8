"""vLLM shares its KV cache through the fabric: a connector that vLLM loads by name.

    KVTransferConfig(
        kv_connector="KVFabricConnector",
        kv_connector_module_path="kvfabric_client.integrations.vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
    )

Made for vLLM 0.32. It only carries vLLM's calls to the scheduler's or the worker's side.
"""

from __future__ import annotations

import atexit
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
from kvfabric_client.integrations._vllm_layout import BlockMemory, shape_of, why_not_served
from kvfabric_client.integrations._vllm_link import Door, log
from kvfabric_client.integrations._vllm_messages import StepJobs
from kvfabric_client.integrations._vllm_scheduler import SchedulerSide
from kvfabric_client.integrations._vllm_worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

MIB = 1024 * 1024


class ConnectorSettings(BaseModel):
    """What `kv_connector_extra_config` may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    home: str | None = None
    """The home node ("unix:PATH", "tcp:HOST:PORT"); None finds the one on this host."""
    tenant: str = DEFAULT_TENANT
    load_timeout_s: float = Field(default=5.0, gt=0)
    """A load that takes longer is given up, and its blocks are computed."""
    save_queue_bytes: int = Field(default=512 * MIB, ge=0)
    """Copies of blocks on their way to the fabric; further ones are not saved."""
    weights_revision: str | None = Field(default=None, min_length=1)
    """A digest of the weight files or a commit id, instead of reading the files."""


class KVFabricConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # vllm is untyped here
    """One role of one engine. Its KV is only what its namespace says, or it takes no part."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        """Refused for settings with which vLLM would fail requests or share KV wrongly."""
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._served = False
        transfer = vllm_config.kv_transfer_config
        self._settings = settings_of(transfer)
        reason = why_not_served(vllm_config, kv_cache_config)
        if reason:
            log.warning("kvfabric: this engine runs without the fabric, because %s", reason)
            return
        self._shape = shape_of(vllm_config, kv_cache_config)
        self._door = Door(
            self._settings.home,
            namespace_of(
                vllm_config,
                self._shape.format(),
                self._settings.tenant,
                self._settings.weights_revision,
            ),
        )
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(
                self._shape,
                self._door,
                loads=transfer.is_kv_consumer,
                saves=transfer.is_kv_producer,
            )
        self._served = True

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is only a later miss."""
        return False

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if not self._served:
            return
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        self._worker = WorkerSide(
            BlockMemory(kv_caches, self._kv_cache_config.num_blocks),
            self._shape,
            self._shape.first_head(get_tensor_model_parallel_rank()),
            self._door,
            load_timeout_s=self._settings.load_timeout_s,
            save_queue_bytes=self._settings.save_queue_bytes,
        )
        atexit.register(self.shutdown)  # an engine in the process may end without a shutdown

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        if self._worker:
            self._worker.begin(self._jobs())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: a request is computed only after its load ended."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Whole blocks are saved, after the last layer."""

    def wait_for_save(self) -> None:
        if self._worker:
            self._worker.save(self._jobs())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._worker.finished() if self._worker else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.failed_blocks() if self._worker else set()

    def shutdown(self) -> None:
        """Stores what is queued, within a deadline, and leaves the fabric."""
        worker, self._worker = self._worker, None
        if worker:
            atexit.unregister(self.shutdown)
            worker.close()
        scheduler, self._scheduler = self._scheduler, None
        if scheduler:
            scheduler.close()

    def _jobs(self) -> StepJobs:
        jobs = self._get_connector_metadata()
        assert isinstance(jobs, StepJobs)
        return jobs

    # The scheduler's side.

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        tokens = self._scheduler.match(request, num_computed_tokens) if self._scheduler else 0
        return tokens, tokens > 0

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        if self._scheduler:
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepJobs:
        return self._scheduler.step(scheduler_output) if self._scheduler else StepJobs()

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self._scheduler:
            self._scheduler.loaded(
                connector_output.finished_recving or (), connector_output.invalid_block_ids
            )

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Full blocks were copied out in the step that filled them: nothing is held back."""
        return False, self._scheduler.finished(request) if self._scheduler else None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    def reset_cache(self) -> bool:
        """Called when weights change in place: their revision is unknown from now on."""
        if self._scheduler:
            log.warning(
                "kvfabric: this engine's caches were reset, so its weights may have changed; "
                "it runs without the fabric until it is started again"
            )
            self._scheduler.close()
            self._scheduler = None
        return True


def settings_of(transfer: KVTransferConfig) -> ConnectorSettings:
    """Refused where vLLM would not recompute what fails to load, and for unknown settings."""
    if transfer.kv_load_failure_policy != "recompute":
        raise Refused(
            f"kv_load_failure_policy is {transfer.kv_load_failure_policy!r}, with which vLLM ends "
            "requests whose KV fails to load; set it to 'recompute' in --kv-transfer-config"
        )
    try:
        return ConnectorSettings.model_validate(transfer.kv_connector_extra_config)
    except ValidationError as error:
        raise Refused(f"kv_connector_extra_config: {error}") from error
