"""Where Prometheus finds the controller and the agents of a job: a file that is kept up to date (file_sd), or over HTTP."""

import asyncio
import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from evermesh.launcher.config import ApiConfig
from evermesh.launcher.contact import read_contact
from evermesh.launcher.metrics.serving import PATH
from evermesh.launcher.run_directory import Run

if TYPE_CHECKING:
    from evermesh.launcher.controller.controller import Controller

Target = dict[str, Any]
"""An address and the labels of what it tells, in the words of Prometheus."""

JOB_PATH = "/api/metrics"
_LOOK_S = 1.0


def targets_of(controller: "Controller") -> list[Target]:
    """The controller, and every agent that serves numbers and is not lost."""
    run = controller.run
    of_agents = (
        _target(node.metrics, run, "agent", PATH, node=node.name, host=node.host)
        for node in controller.nodes
        if node.metrics is not None and node.state != "lost"
    )
    return [*_of_controller(run), *of_agents]


def _of_controller(run: Run) -> list[Target]:
    url = read_contact(run.directory)
    return [] if url is None else [_target(url.removeprefix("http://"), run, "controller", JOB_PATH)]


def _target(address: str, run: Run, role: str, path: str, **labels: str) -> Target:
    return {"targets": [address], "labels": {"__metrics_path__": path, "run": run.name, "role": role, **labels}}


class TargetsFile:
    """The file of a run, where ``config`` wants it. Prometheus sees an old list or a new one, never half of one."""

    def __init__(self, run: Run, config: ApiConfig) -> None:
        self._path = run.directory / "prometheus.json"
        self._lock, self._is_over = threading.Lock(), False
        if config.targets is not None:
            self._path = config.targets / f"{run.name}.json"
            with suppress(OSError):  # told when it is written
                config.targets.mkdir(parents=True, exist_ok=True)

    async def follow(self, controller: "Controller") -> None:
        """Write it whenever something has changed, until cancelled."""
        told: list[Target] | None = None
        while True:
            found = targets_of(controller)
            if found != told and await asyncio.to_thread(self._write, found):  # the loop has leases to renew
                told = found
            await asyncio.sleep(_LOOK_S)

    def end(self, controller: "Controller") -> None:
        """The job is over. Of one that failed the controller stays in the list: it does not answer, which is an alert."""
        self._write(_of_controller(controller.run) if controller.state == "failed" else [], is_last=True)

    def _write(self, targets: Sequence[Target], *, is_last: bool = False) -> bool:
        """Whether that is done; a job is not ended for want of it."""
        new = self._path.with_name(f"{self._path.name}.new")
        with self._lock:
            if self._is_over:
                return True
            self._is_over = is_last
            try:
                new.write_text(json.dumps(targets, indent=1) + "\n")
                os.replace(new, self._path)
            except OSError as error:
                print(f"targets for Prometheus are not written: {error}", flush=True)
                return False
        return True
