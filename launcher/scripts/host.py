"""Node 0's side of a job on several machines: it passes on what one node tells, and decides for all."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from pydantic import ValidationError

from evermesh.launcher.scripts.nodes import Node
from evermesh.launcher.scripts.peers import Judge, Listener, Report, Verdict
from evermesh.launcher.scripts.wire import Connection

_END_TIMEOUT_S = 30.0
"""After the grace of the job: a node that has not ended its ranks by then counts as lost."""
_LINGER_S = 2.0


class Host:
    """The launcher of node 0. ``guests``: the connections to the others, by node."""

    def __init__(self, node: Node, guests: Mapping[int, Connection], max_restarts: int, grace_s: float) -> None:
        self.nodes = (node,)
        self.is_ending = False
        self._guests = dict(guests)
        self._end_timeout_s = grace_s + _END_TIMEOUT_S
        self._judge = Judge(max_restarts)
        self._listener: Listener | None = None
        self._reports: dict[int, Report] = {}
        self._lost: list[str] = []
        self._stopped_by: int | None = None
        self._deadline_s: float | None = None

    def listen(self, listener: Listener) -> None:
        self._listener = listener
        for number, guest in self._guests.items():
            listener.wakeups.add(guest, partial(self._read, number))

    def tell_failure(self) -> None:
        self._end()

    def tell_stop(self, number: int) -> None:
        self._stop(number)

    def tell_kill(self) -> None:
        self._tell("kill")

    def submit(self, report: Report) -> None:
        self._reports[0] = report

    def verdict(self) -> Verdict | None:
        if 0 not in self._reports or not self._all_ended():
            return None
        verdict = self._judge.judge(self._reports, self._stopped_by, tuple(self._lost))
        self._reports, self.is_ending, self._deadline_s = {}, False, None
        self._tell("verdict", verdict=verdict.model_dump(mode="json"))
        return verdict

    def close(self) -> None:
        for guest in self._guests.values():
            guest.close(_LINGER_S)

    def _all_ended(self) -> bool:
        missing = [number for number in self._guests if number not in self._reports]
        if missing and self._deadline_s is not None and time.monotonic() > self._deadline_s:
            for number in missing:
                self._lose(number)
            return True
        return not missing

    def _read(self, number: int) -> None:
        guest = self._guests[number]
        try:
            for message in guest.receive():
                self._take(number, message)
        except (ValidationError, KeyError, TypeError):
            guest.is_lost = True  # it is of another version, or none of us
        if guest.is_lost:
            self._lose(number)

    def _take(self, number: int, message: dict[str, Any]) -> None:
        assert self._listener
        if message["kind"] == "failed":
            self._end(number)
        elif message["kind"] == "stop":
            self._stop(message["signal"], number)
            self._listener.stop(message["signal"])
        elif message["kind"] == "kill":
            self._tell("kill", but=number)
            self._listener.kill()
        elif message["kind"] == "ended":
            self._reports[number] = Report.model_validate(message["report"]).received()

    def _end(self, but: int | None = None) -> None:
        """Let all other nodes end their ranks."""
        if not self.is_ending:
            self.is_ending = True
            self._deadline_s = time.monotonic() + self._end_timeout_s
            self._tell("end", but=but)

    def _stop(self, number: int, but: int | None = None) -> None:
        if self._stopped_by is None:
            self._stopped_by = number
            self._deadline_s = time.monotonic() + self._end_timeout_s
            self._tell("stop", but=but, signal=number)

    def _lose(self, number: int) -> None:
        guest = self._guests.pop(number)
        assert self._listener
        self._listener.wakeups.remove(guest)
        guest.close()
        self._lost.append(f"node {number}")
        self._reports.pop(number, None)
        self._end()

    def _tell(self, kind: str, but: int | None = None, **fields: object) -> None:
        for number, guest in self._guests.items():
            if number != but:
                guest.send(kind, **fields)
