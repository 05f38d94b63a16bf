"""Nodes of a Ray cluster: one placement group, and in each of its bundles an actor that runs the agent.

Group and actors are detached: they outlive the controller, which is their driver, and are found again by its successor.
Everything that asks Ray for something happens in one thread, so that the controller never waits for the cluster.
"""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from evermesh.launcher.agent.spec import AgentSpec
from evermesh.launcher.config import JobConfig
from evermesh.launcher.placement import ray_cluster as cluster
from evermesh.launcher.placement.ray_agent import RayAgent, Surroundings, machine
from evermesh.launcher.placement.specs import spec_of
from evermesh.launcher.run_directory import Run

_LOOK_S = 0.1
_AGAIN_S = 1.0
_LEAVE_WAIT_S = 5.0
_GONE_WAIT_S = 5.0
_PASSED_ON = ("GLOO_", "NCCL_", "PYTORCH_", "TORCH_")
_CLUSTER_AWAY = (RayError, RuntimeError, ValueError, OSError)


@dataclass(slots=True)
class _Actor:
    """An agent that was sent into the cluster."""

    life: int
    """Agents that its node had before."""
    handle: Any
    over: Any
    """Becomes ready when the agent has ended."""
    started: Any
    """Becomes ready when the actor runs; None for one that an earlier controller started."""
    ray_node: str | None = None
    """Ray's name of the node where it runs, once it does."""


class RayPlacement:
    """Agents as actors; node-N is in bundle N of the placement group."""

    def __init__(self, run: Run, config: JobConfig, token: str) -> None:
        self._run, self._config, self._token = run, config, token
        self.address = cluster.connect(config.on, cluster.namespace_of(run), cluster.runtime_env_of(config))
        self._bundle, self._surroundings = cluster.bundle_of(config), _surroundings()
        self._lives: dict[str, int] = {}
        """Which agent each node is to have: its first, its second, ..."""
        self._ended: dict[str, int] = {}
        """The last agent of each node that has ended by itself."""
        self._actors: dict[str, _Actor] = {}
        self._group: PlacementGroup | None = None
        self._asked_s = 0.0
        self._was_placed = False
        self._shortage = ""
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="ray", daemon=True)

    def adopt(self, pids: dict[str, int]) -> None:
        """Find what an earlier controller left in the cluster: agents of this attempt, or remains of another."""
        if not pids:
            cluster.give_back()
            return
        self._group, self._was_placed = cluster.find_group(), True
        ray_nodes = cluster.look_at(self._group).ray_nodes if self._group else {}
        for name in ray.util.list_named_actors():
            node, _, life = name.partition(".")
            handle = ray.get_actor(name)
            self._actors[node] = _Actor(int(life), handle, handle.ended.remote(), None, ray_nodes.get(_number(node)))
        self._lives = {node: actor.life for node, actor in self._actors.items()}
        for node in pids:
            self._lives.setdefault(node, 1)

    def start(self, nodes: Sequence[str]) -> None:
        """Send an agent to each node as soon as the cluster has placed them."""
        for node in nodes:
            self._lives.setdefault(node, 1)
        self._thread.start()

    def is_alive(self, node: str) -> bool | None:
        """False when the agent has ended by itself; a node that Ray has lost may come back, the lease has the last word."""
        return False if node in self._ended and self._ended[node] == self._lives[node] else None

    def replace(self, node: str) -> bool:
        """End the agent of ``node`` if it can still be reached, and start another when the cluster has a node for it."""
        self._lives[node] += 1
        return True

    def shortage(self) -> str:
        """What the cluster lacks; empty when every node is placed."""
        return self._shortage

    def time_left_s(self) -> float | None:
        """None: nobody takes the nodes away."""
        return None

    def end(self, joining: Sequence[str] = ()) -> None:
        """Wait for the agents to leave, and take everything of the job out of the cluster."""
        self._is_ending.set()
        self._thread.join(_LEAVE_WAIT_S)
        try:
            self._wait_left()
            cluster.give_back()
            until = time.monotonic() + _GONE_WAIT_S
            while ray.util.list_named_actors() and time.monotonic() < until:
                time.sleep(0.05)
            ray.shutdown()
        except _CLUSTER_AWAY as error:
            print(f"the Ray cluster could not be told that the job is over: {error}", flush=True)

    def _wait_left(self) -> None:
        """Let agents that run tidy up: they have been told to leave."""
        running = [actor.over for actor in self._actors.values() if actor.ray_node]
        if running:
            ray.wait(running, num_returns=len(running), timeout=_LEAVE_WAIT_S)

    # in a thread of its own

    def _keep(self) -> None:
        while not self._is_ending.wait(_LOOK_S):
            try:
                self._look()
            except Exception as error:  # noqa: BLE001  agents and workers need Ray only when something is to be placed
                print(f"the Ray cluster is asked again after {type(error).__name__}: {error}", flush=True)
                self._is_ending.wait(_AGAIN_S)

    def _look(self) -> None:
        if self._group is None:
            self._ask_for(self._config.nodes + self._config.spares)
        assert self._group is not None
        view = cluster.look_at(self._group)
        self._shortage = "" if view.state == "CREATED" else cluster.shortage(view.bundles, self._config)
        self._was_placed = self._was_placed or view.state == "CREATED"
        if not self._was_placed:
            self._do_without_spare(view.bundles)
            return
        for node, life in list(self._lives.items()):
            actor = self._actors.get(node)
            if actor is not None and actor.life != life:
                ray.kill(actor.handle)
                del self._actors[node]
            if node in self._actors:
                self._watch(node, self._actors[node])
            elif _number(node) < view.bundles and self._ended.get(node) != life:
                self._actors[node] = self._send(node, life)

    def _ask_for(self, bundles: int) -> None:
        self._group = ray.util.placement_group(
            [self._bundle] * bundles,
            strategy="STRICT_SPREAD",
            name=cluster.GROUP,
            lifetime="detached",
            **cluster.labels_of(self._config, bundles),
        )
        self._asked_s = time.monotonic()

    def _do_without_spare(self, bundles: int) -> None:
        """Ask for one node less if the cluster has not enough: a job needs its nodes, spares are only good to have."""
        if bundles == self._config.nodes or time.monotonic() - self._asked_s < self._config.ray.spare_wait_s:
            return
        print(f"{self._shortage} Going on with one spare less.", flush=True)
        ray.util.remove_placement_group(self._group)
        self._ask_for(bundles - 1)

    def _send(self, node: str, life: int) -> _Actor:
        assert self._group is not None
        where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=_number(node))
        handle: Any = (
            ray.remote(RayAgent)
            .options(
                name=f"{node}.{life}",
                get_if_exists=True,  # should the cluster have been away before this was told
                lifetime="detached",
                num_cpus=self._bundle["CPU"],
                num_gpus=self._bundle.get("GPU", 0.0),
                max_restarts=0,
                scheduling_strategy=where,
            )
            .remote()
        )
        started = handle.ray_node.remote()
        # not given to the constructor: the cluster keeps the arguments of that one
        over = handle.run.remote(self._spec(node).model_dump_json(), self._token, self._surroundings)
        return _Actor(life, handle, over, started)

    def _watch(self, node: str, actor: _Actor) -> None:
        if actor.ray_node is None and actor.started is not None and _is_ready(actor.started):
            actor.ray_node = _result(actor.started)
        if _is_ready(actor.over):
            self._take_end(node, actor)

    def _take_end(self, node: str, actor: _Actor) -> None:
        """Tell an agent that ended by itself from one that was lost with its node, or is only out of reach."""
        try:
            ray.get(actor.over)
            self._note_end(node, actor, "")
        except ActorUnavailableError:  # out of reach, perhaps not for good
            actor.over = actor.handle.ended.remote()
        except RayTaskError as error:
            self._note_end(node, actor, str(error.cause or error))
        except RayActorError as error:
            if error.actor_init_failed or actor.ray_node in cluster.living_nodes():
                self._note_end(node, actor, str(error))
            else:
                del self._actors[node]  # its node is gone: placed again as soon as there is another

    def _note_end(self, node: str, actor: _Actor, why: str) -> None:
        if why:
            with (self._run.logs / f"agent-{node}.log").open("a") as log:
                log.write(f"{why}\n")
        self._ended[node] = actor.life
        del self._actors[node]

    def _spec(self, node: str) -> AgentSpec:
        return spec_of(self._run, self._config, node)


def _surroundings() -> str:
    passed_on = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    return Surroundings(host=machine(), folder=Path.cwd(), variables=passed_on).model_dump_json()


def _is_ready(reference: Any) -> bool:
    return bool(ray.wait([reference], timeout=0)[0])


def _result(reference: Any) -> str | None:
    try:
        return str(ray.get(reference))
    except RayError:
        return None


def _number(node: str) -> int:
    return int(node.rpartition("-")[2])
