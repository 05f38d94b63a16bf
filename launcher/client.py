"""Asking the controller of a run, over its HTTP API; imports no torch."""

import time
from typing import Any

import httpx2

from evermesh.launcher.contact import read_contact, read_token
from evermesh.launcher.controller.status import JobStatus
from evermesh.launcher.errors import ControllerLost
from evermesh.launcher.run_directory import Run

_TIMEOUT_S = 5.0
_RETRY_S = 0.1


class Client:
    """Talks to the controller of ``run``. Waits ``patience_s`` for one that is being started again.

    Raises, in every method:
        ControllerLost: there is none, or it does not answer.
    """

    def __init__(self, run: Run, patience_s: float = 5.0) -> None:
        self._run, self._patience_s = run, patience_s

    def status(self) -> JobStatus:
        """The job as it is now."""
        return JobStatus.model_validate_json(self._ask("GET", "status").content)

    def stop(self, signal: int, *, at_once: bool = False, grace_s: float | None = None) -> None:
        """Ask for the end of the job; returns when the controller knows."""
        self._ask("POST", "stop", {"signal": int(signal), "at_once": at_once, "grace_s": grace_s})

    def save(self) -> None:
        """Ask for a checkpoint after the current step."""
        self._ask("POST", "save")

    def write_stacks(self) -> None:
        """Have every rank write down what it is doing, in ``logs/rank-N.stacks``."""
        self._ask("POST", "stacks")

    def link(self) -> str:
        """The address of the dashboard, with the token where no server and no log sees it."""
        return f"{read_contact(self._run.directory)}/#token={read_token(self._run.directory)}"

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        until = time.monotonic() + self._patience_s
        while True:
            try:
                return self._ask_once(method, path, body)
            except (httpx2.TransportError, OSError) as error:
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
        response = httpx2.request(
            method, f"{url}/api/{path}", json=body, headers=headers, timeout=_TIMEOUT_S, trust_env=False
        )
        response.raise_for_status()
        return response
