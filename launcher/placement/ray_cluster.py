"""The Ray cluster of a job: connecting to it, what it can offer, and what a job holds there."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.exceptions import AuthenticationError, RayError
from ray.util.placement_group import PlacementGroup, placement_group_table

from evermesh.launcher.config import JobConfig
from evermesh.launcher.errors import ClusterMissing
from evermesh.launcher.placement.ray_here import (
    RUNTIME_ENV,
    cluster_of_this_machine,
    is_submission,
    lacks_token,
    probe,
    told_cluster,
)
from evermesh.launcher.run_directory import Run
from evermesh.runtime.config import CpuDevice

GROUP = "nodes"
"""Name of a job's placement group, in its namespace."""
_PROBE_S = 3.0
_CONNECT_S = 20.0


def namespace_of(run: Run) -> str:
    """Where the actors of a run have their names: other runs, also of the same name, have others."""
    path = str(run.directory.resolve())
    return f"evermesh-{run.name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def runtime_env_of(config: JobConfig) -> dict[str, Any]:
    """What agents find on their nodes, as Ray takes it.

    The job's, to which Ray adds that of a submission; for a controller that an agent has started what that agent has.
    """
    inherited = os.environ.get(RUNTIME_ENV)
    return json.loads(inherited) if inherited else config.ray.runtime_env.told()


def connect(on: str, namespace: str, runtime_env: Mapping[str, Any] | None = None) -> str:
    """Join the cluster that ``on`` names; returns the address of this machine in it.

    ``ray`` is the cluster of RAY_ADDRESS, or the one that this machine belongs to. ``ray://HOST:PORT`` is the cluster whose
    head (its control service) listens there; Ray Client, which some take this spelling for, cannot outlive its caller.

    Raises:
        ClusterMissing: there is none, this machine is no node of it, or has not its token.
    """
    given = on.removeprefix("ray://") if on.startswith("ray://") else None
    named = given or told_cluster() or cluster_of_this_machine()
    if named is not None:
        _probe(named, on)
    if lacks_token():
        raise ClusterMissing(_no_token(on))
    if is_submission() and runtime_env:
        os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # else Ray refuses what both tell
    answers: SimpleQueue[str | BaseException] = SimpleQueue()
    joining = partial(_join, named or "auto", namespace, dict(runtime_env or {}))
    threading.Thread(target=lambda: answers.put(joining()), name="connect", daemon=True).start()
    try:
        answer = answers.get(timeout=_CONNECT_S)
    except Empty:
        raise ClusterMissing(_missing(on, f"what listens there gave no answer in {_CONNECT_S:g} s")) from None
    if isinstance(answer, AuthenticationError):
        raise ClusterMissing(_no_token(on)) from answer
    if isinstance(answer, BaseException):
        raise ClusterMissing(_missing(on, str(answer))) from answer
    return answer


def _join(address: str, namespace: str, runtime_env: dict[str, Any]) -> str | BaseException:
    """Connect this process; in a thread that can be left alone, for where no cluster is Ray goes on trying for minutes."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address != "auto":
            GcsClient(address=address)  # refuses a wrong token at once, and not after 22 s
        ray.init(address=address, namespace=namespace, runtime_env=runtime_env or None, **quiet)
        ray.put(None)  # what that imports at first must not meet imports of another thread
        return ray.util.get_node_ip_address()
    except (ConnectionError, RuntimeError, ValueError, RayError, SystemExit) as error:  # Ray leaves with SystemExit
        return error


def _probe(address: str, on: str) -> None:
    """Find out at once that nobody listens there."""
    try:
        probe(address, _PROBE_S)
    except (OSError, ValueError) as error:
        raise ClusterMissing(_missing(on, str(error))) from error


def _no_token(on: str) -> str:
    return (
        f"the Ray cluster ({on}) wants a token, and this machine has none, or another one. Set RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN here (or RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token); `ray get-auth-token` prints it on the head."
    )


def _missing(on: str, why: str) -> str:
    lines = [line.strip() for line in why.splitlines() if line.strip()]
    way_on = (
        "Give the address that `ray start` printed, usually port 6379 of the head, not the one of Ray Client (10001)"
        if on.startswith("ray://")
        else "Start one with `ray start --head`, set RAY_ADDRESS, or give --on ray://HOST:PORT"
    )
    return (
        f"no Ray cluster was reached with --on {on}: {lines[0] if lines else 'it does not answer'}. {way_on}; this machine "
        "must be a node of the cluster."
    )


def bundle_of(config: JobConfig) -> dict[str, float]:
    """What one node gives to the job: a CPU per thread of its workers, a GPU per worker on CUDA, and what else it names."""
    slots, device = config.workers // config.nodes, config.train.device
    if isinstance(device, CpuDevice):
        return {"CPU": float(slots * device.threads), **config.ray.resources}
    return {"CPU": float(slots), "GPU": float(slots), **config.ray.resources}


def labels_of(config: JobConfig, bundles: int) -> dict[str, Any]:
    """The option of a placement group that asks for the labels of the job; none where it asks for none."""
    labels = config.ray.label_selector
    return {"bundle_label_selector": [labels] * bundles} if labels else {}


@dataclass(frozen=True, slots=True)
class GroupView:
    """A placement group as the cluster describes it now."""

    state: str
    bundles: int
    ray_nodes: Mapping[int, str]
    """By bundle."""


def look_at(group: PlacementGroup) -> GroupView:
    """Ask for the state of ``group``."""
    table = placement_group_table(group)
    return GroupView(table["state"], len(table["bundles"]), table["bundles_to_node_id"])


def living_nodes() -> dict[str, Mapping[str, float]]:
    """What the nodes have that Ray counts as alive, in use or not, by Ray's name for them."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def shortage(wanted: int, config: JobConfig) -> str:
    """Why the cluster cannot give what is wanted."""
    nodes, bundle, labels = living_nodes().values(), bundle_of(config), config.ray.label_selector
    fitting = sum(all(node.get(kind, 0.0) >= number for kind, number in bundle.items()) for node in nodes)
    each = " and ".join(f"{number:g} {kind}" for kind, number in bundle.items())
    busy = ", some of it in use" if fitting >= wanted else ""
    labelled = f" with the labels {', '.join(f'{name}={value}' for name, value in labels.items())}" if labels else ""
    return (
        f"The job asks the Ray cluster for {each} on each of {wanted} nodes{labelled}; {fitting} of its {len(nodes)} nodes "
        f"have that much{busy}."
    )


def find_group() -> PlacementGroup | None:
    """The placement group of the job, if it has one."""
    try:
        return ray.util.get_placement_group(GROUP)
    except ValueError:
        return None


def give_back() -> None:
    """Kill every agent of the job and remove its placement group."""
    for name in ray.util.list_named_actors():
        with suppress(ValueError):  # gone meanwhile
            ray.kill(ray.get_actor(name))
    group = find_group()
    if group is not None:
        ray.util.remove_placement_group(group)
