"""What the API of a job tells to somebody on a host: asked over HTTP with the token of the run, and by no other way."""

import ctypes
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from evermesh.launcher import Run
from evermesh.launcher.contact import read_contact, read_token
from evermesh.launcher.controller.status import JobStatus, NodeStatus
from tests.launcher.hosts import Host

_NEW_NETWORK = 0x40000000
"""CLONE_NEWNET of setns(2)."""
_ANSWER_S = 10.0


class Told:
    """The API of ``run`` as it is seen on ``host``; follows its stream, also over the next controller. A context manager."""

    def __init__(self, run: Run, host: Host) -> None:
        self._run = run
        self._threads = ThreadPoolExecutor(2, initializer=_enter, initargs=(host.name,))
        self._is_over = threading.Event()
        self.board: dict[str, dict[str, Any]] = {}
        """What the page of the job shows, by section."""
        self.losses: dict[int, float] = {}
        """By step, as the stream told it last."""
        self.states: list[str] = []
        """Of the job, one after the other."""

    def __enter__(self) -> Self:
        self._following = self._threads.submit(self._follow)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._threads.shutdown()
        self._following.result()

    def ask(self, path: str, body: Any = None, token: str | None = None) -> httpx2.Response:
        """GET, or POST where there is a body; waits for a controller, as ``evermesh status`` does."""
        return self._threads.submit(self._ask, path, body, token).result()

    def status(self) -> JobStatus:
        return JobStatus.model_validate_json(self.ask("status").content)

    def members(self) -> list[NodeStatus]:
        """The nodes that have ranks."""
        return [node for node in self.status().nodes if node.ranks]

    def events(self) -> dict[str, list[dict[str, Any]]]:
        """By kind."""
        found: dict[str, list[dict[str, Any]]] = {}
        for event in self.ask("events").json():
            found.setdefault(event["kind"], []).append(event)
        return found

    def numbers(self) -> dict[tuple[str, ...], float]:
        """What Prometheus is told: by name of the sample and values of its labels, sorted by their names."""
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(self.ask("metrics").text)
            for sample in family.samples
        }

    def wait(self, holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
        """Return as soon as ``holds``."""
        until = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < until, (
                f"not in {timeout_s} s; {self.states}, {len(self.losses)} steps, {self.board}"
            )
            time.sleep(0.05)

    def wait_steps(self, number: int) -> None:
        """Wait until the stream has told of so many steps more."""
        before = len(self.losses)
        self.wait(lambda: len(self.losses) >= before + number)

    # in threads that are on the host

    def _ask(self, path: str, body: Any, token: str | None) -> httpx2.Response:
        until = time.monotonic() + _ANSWER_S
        while True:
            try:
                with httpx2.Client(trust_env=False, timeout=_ANSWER_S) as http:
                    method = "GET" if body is None else "POST"
                    return http.request(method, self._url(path), json=body, headers=self._headers(token))
            except (httpx2.HTTPError, OSError):
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def _follow(self) -> None:
        while not self._is_over.wait(0.1):
            try:
                with (
                    httpx2.Client(trust_env=False, timeout=_ANSWER_S) as http,
                    http.stream("GET", self._url("watch"), headers=self._headers()) as stream,
                ):
                    for line in stream.iter_lines():
                        self._take(json.loads(line))
                        if self._is_over.is_set():
                            break
            except (httpx2.HTTPError, OSError):  # the controller is gone, or not there yet
                continue

    def _take(self, message: dict[str, Any]) -> None:
        for section, fields in message["changed"].items():
            self.board.setdefault(section, {}).update(fields)
        state = self.board["job"]["state"]
        if self.states[-1:] != [state]:
            self.states.append(state)
        self.losses |= {step: loss for step, loss, *_ in message["steps"]}

    def _url(self, path: str) -> str:
        url = read_contact(self._run.directory)
        if url is None:
            raise FileNotFoundError("no controller yet")
        return f"{url}/api/{path}"

    def _headers(self, token: str | None = None) -> dict[str, str]:
        return {"Authorization": f"Bearer {token or read_token(self._run.directory)}"}


def _enter(name: str) -> None:
    """Have this thread, and it alone, in the network of a host."""
    with open(f"/run/netns/{name}") as network:
        if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
