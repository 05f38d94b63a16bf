"""Asking the controller of a run, over its HTTP API; imports no torch."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
from pydantic import JsonValue

from evermesh.launcher.contact import read_contact, read_token
from evermesh.launcher.controller.status import JobStatus
from evermesh.launcher.errors import ControllerLost, DrainRefused
from evermesh.launcher.run_directory import Run

_TIMEOUT_S = 5.0
_RETRY_S = 0.1
_CONFLICT = 409


class Client:
    """Talks to the controller of ``run``. Waits ``patience_s`` for one that is being started again.

    Raises, in every method:
        ControllerLost: there is none, or it does not answer.
    """

    def __init__(self, run: Run, patience_s: float = 5.0) -> None:
        self._run, self._patience_s = run, patience_s
        # no proxy stands between us and our own machine; certificates, whose loading takes 45 ms, are not met on http
        self._http = httpx2.Client(trust_env=False, verify=False, timeout=_TIMEOUT_S)

    def status(self) -> JobStatus:
        """The job as it is now."""
        return JobStatus.model_validate_json(self._ask("GET", "status").content)

    def metrics(self) -> str:
        """The numbers of the job in the text format of Prometheus."""
        return self._ask("GET", "metrics").text

    def stop(self, signal: int, *, at_once: bool = False, grace_s: float | None = None) -> None:
        """Ask for the end of the job; returns when the controller knows."""
        self._ask("POST", "stop", {"signal": int(signal), "at_once": at_once, "grace_s": grace_s})

    def save(self) -> None:
        """Ask for a checkpoint after the current step."""
        self._ask("POST", "save")

    def change_layout(self, changes: Mapping[str, JsonValue]) -> None:
        """Ask the ranks to go on with these changes to their layout; the event log tells what became of it."""
        self._ask("POST", "relayout", {"changes": dict(changes)})

    def drain(self, node: str, by: str, because: str) -> str:
        """Have the job go on without a node, from memory; returns, when the controller knows, what the job calls it.

        Raises:
            DrainRefused: it cannot.
        """
        return str(self._ask("POST", "drain", {"node": node, "by": by, "because": because}).json()["node"])

    def write_stacks(self) -> None:
        """Have every rank write down what it is doing, in ``logs/rank-N.stacks``."""
        self._ask("POST", "stacks")

    def write_entry_page(self) -> Path:
        """Make a file that leads a browser to the dashboard, and return its path. Only its owner can read it.

        It holds the token, which would otherwise stand on the screen, or in the arguments of a browser, for all to read.
        """
        directory = self._run.directory.absolute()
        link = f"{read_contact(directory)}/#token={read_token(directory)}"
        page = directory / "dashboard.html"
        page.unlink(missing_ok=True)
        descriptor = os.open(page, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(
                f'<!doctype html><meta http-equiv="refresh" content="0;url={link}"><a href="{link}">dashboard</a>\n'
            )
        return page

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        until = time.monotonic() + self._patience_s
        while True:
            try:
                return self._ask_once(method, path, body)
            except (httpx2.HTTPError, OSError) as error:
                if time.monotonic() > until:
                    raise ControllerLost(
                        f"the controller of run {self._run.name} does not answer: {error}. Its log: "
                        f"{self._run.logs / 'controller.log'}. If it is gone, go on with: "
                        f"evermesh resume {self._run.directory}"
                    ) from error
                time.sleep(_RETRY_S)

    def _ask_once(self, method: str, path: str, body: dict[str, Any] | None) -> httpx2.Response:
        url = read_contact(self._run.directory)
        if url is None:
            raise FileNotFoundError(f"{self._run.directory} does not say where it is")
        headers = {"Authorization": f"Bearer {read_token(self._run.directory)}"}
        response = self._http.request(method, f"{url}/api/{path}", json=body, headers=headers)
        if response.status_code == _CONFLICT:
            raise DrainRefused(response.json()["detail"])
        response.raise_for_status()
        return response
