"""Asking a running job to go on without a node, and waiting until it does."""

import time

from evermesh.fault.cluster.records import who
from evermesh.launcher.client import Client
from evermesh.launcher.errors import DrainRefused, RunNotFound
from evermesh.launcher.run_directory import Run

_LOOK_S = 0.1


def drain_node(run: Run, node: str, because: str, *, wait: bool) -> str:
    """Have ``run`` go on without ``node``; returns what to tell about it.

    Raises:
        RunNotFound: it does not live, or ended before it could go on.
        DrainRefused: it cannot go on without that node.
        ControllerLost: its controller does not answer.
    """
    if not run.is_alive():
        raise RunNotFound(
            f"run {run.name} does not live: it is {run.status()}. `evermesh cordon` keeps jobs from a node."
        )
    client = Client(run)
    name = client.drain(node, who(), because)
    if not wait:
        return f"asked {run.name} to leave {node}; evermesh nodes {run.name} tells when it has"
    while run.is_alive():
        status = client.status()
        mine = next(found for found in status.nodes if found.node == name)
        if mine.aside is None:
            raise DrainRefused(f"{node} may be used again: somebody has uncordoned it meanwhile.")
        if status.state == "training" and not mine.ranks:
            used = ", ".join(found.node for found in status.nodes if found.ranks)
            goes_on = f"{run.name} goes on without {name}, from step {status.step or 0} on {used}"
            return f"{goes_on}; no job uses it until: evermesh uncordon {mine.known_as or name}"
        time.sleep(_LOOK_S)
    raise RunNotFound(f"run {run.name} ended before it could go on without {node}: it is {run.status()}.")
