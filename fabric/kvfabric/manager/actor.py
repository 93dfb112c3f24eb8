"""The gManager as a Ray actor, and the loop that gives every memory node its rManager.

The actor is a plain class: Ray keeps it alive on the head node and restarts it; its server
works in threads of its own, so that no call of the fabric ever passes through Ray.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvfabric import garbage, logs
from kvfabric.manager.fleet import (
    ACTOR_CALL_RETRIES,
    NODE_ACTOR_CLASS,
    NODE_RESOURCE,
    RAY_NAMESPACE,
    MemoryNode,
    lacking,
    reason,
)
from kvfabric.manager.service import ManagerServer
from kvfabric.manager.settings import ManagerSettings

logger = logs.logger(part="fleet")

ROUND_S = 1.0  # between two looks at Ray's nodes
RETRY_S = 10.0  # from a failed start of an rManager to the next: each takes a process
STOP_DEADLINE_S = 5.0


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What every rManager of the fleet is given, besides its name."""

    manager: str  # host:port
    memory_bytes: int
    runtime_dir: str = ""  # "": that machine's own default


class ManagerActor:
    """Serves the control plane at `settings.listen` for as long as the actor lives.

    Construction fails if the address cannot be bound. All methods can be repeated.
    """

    def __init__(self, settings: ManagerSettings, nodes: NodePlan) -> None:
        logs.configure()
        self._server = ManagerServer(settings)
        try:
            self._server.start()
        except Exception:
            # Ray gives up an actor whose constructor raises, but not one whose process dies: at
            # its first start `up` wants to hear the reason, later the control plane must return.
            if not ray.get_runtime_context().was_current_actor_reconstructed:
                raise
            logger.exception("the gManager could not start again; it keeps trying")
            time.sleep(ROUND_S)
            os._exit(1)
        garbage.collect_seldom()
        self._fleet = Fleet(nodes)
        self._fleet.start()
        threading.Thread(target=self._end_if_fenced, name="fenced", daemon=True).start()

    @ray.method
    def address(self) -> str:
        return self._server.address

    @ray.method
    def troubles(self) -> dict[str, str]:
        """Nodes whose rManager could not be started, and the last reason."""
        return self._fleet.troubles()

    @ray.method
    def stop(self) -> None:
        self._fleet.stop()
        self._server.stop()

    def _end_if_fenced(self) -> None:
        self._server.fenced.wait()
        os._exit(1)


class Fleet:
    """Looks every `ROUND_S` for memory nodes that lack an rManager and starts it there.

    Ray restarts an rManager that dies; the fleet starts those of nodes that joined, and those
    that Ray gave up because their start failed.
    """

    def __init__(self, plan: NodePlan) -> None:
        self._plan = plan
        self._starting: dict[str, Any] = {}  # name -> reference to the new rManager's answer
        self._troubles: dict[str, str] = {}
        self._not_before_s: dict[str, float] = {}  # a start that failed is not repeated at once
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
        module, _, name = NODE_ACTOR_CLASS.partition(":")
        self._actor_class = ray.remote(getattr(importlib.import_module(module), name))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(STOP_DEADLINE_S)

    def troubles(self) -> dict[str, str]:
        return dict(self._troubles)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._round()
            except Exception:  # Ray's control plane may be away for a while: look again
                logger.exception("the fleet could not look at Ray's nodes; it tries again")
            self._stopping.wait(ROUND_S)

    def _round(self) -> None:
        self._settle()
        for node in lacking(ray.nodes(), ray.util.list_named_actors()):
            if node.name in self._starting:
                continue
            if time.monotonic() >= self._not_before_s.get(node.name, 0.0):
                logger.info("starting an rManager", node=node.name)
                self._starting[node.name] = self._launch(node).name.remote()

    def _launch(self, node: MemoryNode) -> Any:
        return self._actor_class.options(
            name=node.actor,
            namespace=RAY_NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=ACTOR_CALL_RETRIES,
            num_cpus=0,
            resources={NODE_RESOURCE: 1},
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.ray_node_id, soft=False),
        ).remote(node.name, self._plan.manager, self._plan.memory_bytes, self._plan.runtime_dir)

    def _settle(self) -> None:
        """Notes which of the starts have succeeded or failed since the last round."""
        for name, answer in list(self._starting.items()):
            if not ray.wait([answer], timeout=0)[0]:
                continue
            del self._starting[name]
            try:
                ray.get(answer)
                self._troubles.pop(name, None)
            except ray.exceptions.RayError as error:
                self._troubles[name] = reason(error)
                self._not_before_s[name] = time.monotonic() + RETRY_S
                logger.warning("an rManager did not start", node=name, why=reason(error))
