"""The side of every other node in a job on several machines: it tells node 0 what happens, and does what it decides."""

from typing import Any

from pydantic import ValidationError

from evermesh.launcher.policy import REQUEUE
from evermesh.launcher.scripts.nodes import Node
from evermesh.launcher.scripts.peers import Listener, Report, Verdict
from evermesh.launcher.scripts.wire import Connection


class Guest:
    """The launcher of a node that is not number 0."""

    def __init__(self, node: Node, host: Connection) -> None:
        self.nodes = (node,)
        self.is_ending = False
        self._host = host
        self._listener: Listener | None = None
        self._report: Report | None = None
        self._verdict: Verdict | None = None
        self._is_host_gone = False

    def listen(self, listener: Listener) -> None:
        self._listener = listener
        listener.wakeups.add(self._host, self._read)

    def tell_failure(self) -> None:
        self._host.send("failed")

    def tell_stop(self, number: int) -> None:
        self._host.send("stop", signal=number)

    def tell_kill(self) -> None:
        self._host.send("kill")

    def submit(self, report: Report) -> None:
        self._report, self._verdict = report, None
        self._host.send("ended", report=report.model_dump(mode="json"))

    def verdict(self) -> Verdict | None:
        if self._report is None:
            return None
        if self._verdict is not None:
            self._report = None
            return self._verdict
        if self._is_host_gone:
            reason = "lost: node 0, which decides; a script gets no other machine"
            return Verdict(exit_code=REQUEUE, reason=reason, told=self._report.told)
        return None

    def close(self) -> None:
        self._host.close()

    def _read(self) -> None:
        try:
            for message in self._host.receive():
                self._take(message)
        except (ValidationError, KeyError, TypeError):
            self._host.is_lost = True
        if self._host.is_lost:
            assert self._listener
            self._listener.wakeups.remove(self._host)
            self._is_host_gone = self.is_ending = True

    def _take(self, message: dict[str, Any]) -> None:
        assert self._listener
        if message["kind"] == "end":
            self.is_ending = True
        elif message["kind"] == "stop":
            self._listener.stop(message["signal"])
        elif message["kind"] == "kill":
            self._listener.kill()
        elif message["kind"] == "verdict":
            self.is_ending = False  # what follows is about the next generation
            self._verdict = Verdict.model_validate(message["verdict"])
