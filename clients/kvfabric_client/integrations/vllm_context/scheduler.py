"""vLLM's scheduler, with which a request whose KV is lost is computed again from there on."""

from __future__ import annotations

import logging
import time

from vllm.v1.core.sched.scheduler import Scheduler

from kvfabric_client.integrations.vllm_context import KVFabricContextConnector

log = logging.getLogger("vllm.kvfabric")


class ContextScheduler(Scheduler):  # type: ignore[misc]  # vllm is untyped for us
    """vLLM goes on from a block that it still has, which is behind what was lost, or ends the
    request. This one preempts it: when it resumes, its prefix is looked up again."""

    def _handle_invalid_blocks(
        self, invalid_block_ids: set[int], num_scheduled_tokens: dict[str, int]
    ) -> set[str]:
        """Answers the requests that end with an error."""
        failed: set[str] = super()._handle_invalid_blocks(invalid_block_ids, num_scheduled_tokens)
        if not isinstance(self.connector, KVFabricContextConnector):
            return failed
        again = {each for each in failed if self.connector.may_begin_again(each)}
        for request_id in again:
            request = self.requests[request_id]
            self.running.remove(request)
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
            log.warning("kvfabric: request %s is computed again, instead of failed", request_id)
        return failed - again
