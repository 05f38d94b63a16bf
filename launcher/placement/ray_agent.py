"""The agent of one node inside an actor of Ray. It is the agent of any other place; Ray says only where it runs.

The code must be installed on every node, and the directory of the run must be on storage that all of them see.
"""

import hmac
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import ray
from pydantic import BaseModel, ConfigDict

from evermesh.launcher.agent.agent import Agent
from evermesh.launcher.agent.spec import AgentSpec
from evermesh.launcher.contact import read_token
from evermesh.launcher.errors import RunNotSeen
from evermesh.launcher.placement.ray_here import RUNTIME_ENV

_OTHERS_WAIT_S = 10.0


class Surroundings(BaseModel):
    """What an agent takes over from the controller, as a process that the controller starts would."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    """The controller's machine, as ``machine`` calls it."""
    folder: Path
    """Relative paths of the job start there."""
    variables: dict[str, str]
    """Environment variables of communication libraries and of torch."""


class RayAgent:
    """An actor that runs one agent. Ray calls its methods one at a time, in the main thread."""

    def ray_node(self) -> str:
        """Ray's name of the node on which this runs."""
        return ray.get_runtime_context().get_node_id()

    def run(self, spec_json: str, token: str, surroundings_json: str) -> None:
        """Run the agent until it is told to leave; ends this process.

        Raises:
            RunNotSeen: this node has another view of storage than the controller.
        """
        spec = AgentSpec.model_validate_json(spec_json)
        surroundings = Surroundings.model_validate_json(surroundings_json)
        _check_seen(spec, token)
        _print_into(spec.run / "logs" / f"agent-{spec.node}.log")
        _load_no_main_module()
        _take_over(surroundings.variables)
        if surroundings.folder.is_dir():
            os.chdir(surroundings.folder)
        is_beside = machine() == surroundings.host
        labels = {name: str(value) for name, value in ray.get_runtime_context().get_node_labels().items()}
        address = ray.util.get_node_ip_address()
        here = {"address": address, "revives": is_beside, "is_head": is_beside, "labels": labels}
        Agent(spec.model_copy(update=here), token).run()
        _give_back()
        ray.actor.exit_actor()

    def ended(self) -> None:
        """Return after ``run``: calls wait for each other."""


def machine() -> str:
    """Name of this machine: whether another process shares it."""
    return f"{socket.gethostname()} {ray.util.get_node_ip_address()}"


def _take_over(variables: Mapping[str, str]) -> None:
    """Have these variables, after those of the job, and what a controller needs that is started here."""
    context = ray.get_runtime_context()
    runtime_env = json.loads(context.get_runtime_env_string())
    os.environ.update({**variables, **runtime_env.get("env_vars", {})})
    os.environ["RAY_ADDRESS"] = context.gcs_address
    os.environ[RUNTIME_ENV] = json.dumps(runtime_env)


def _check_seen(spec: AgentSpec, token: str) -> None:
    try:
        is_same = hmac.compare_digest(read_token(spec.run).encode(), token.encode())
    except OSError:
        is_same = False
    if not is_same:
        raise RunNotSeen(
            f"{socket.gethostname()}, a node of the Ray cluster, does not see {spec.run} as the controller does. Put the "
            "runs on storage that every node mounts at the same path: --set runs=DIR."
        )


def _print_into(log: Path) -> None:
    """Send the output of this process, and of those it starts, to ``log`` instead of Ray's logs."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


def _load_no_main_module() -> None:
    """Forked workers import the main module of their parent under another name; Ray's would load Ray into each of them."""
    main = sys.modules["__main__"]
    main.__spec__ = None
    if hasattr(main, "__file__"):
        del main.__file__


def _give_back() -> None:
    """Remove the placement group if no other agent needs it: nobody else does where the controller is gone for good.

    Of agents that leave together the one with the first name looks after it.
    """
    group, context = ray.util.get_current_placement_group(), ray.get_runtime_context()
    until = time.monotonic() + _OTHERS_WAIT_S
    while (names := sorted(ray.util.list_named_actors())) and names[0] == context.get_actor_name():
        if len(names) == 1 and group is not None:
            ray.util.remove_placement_group(group)
            return
        if time.monotonic() > until:
            return
        time.sleep(0.2)
