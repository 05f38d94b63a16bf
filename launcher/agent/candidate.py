"""An agent's part in the succession: it keeps a copy of the journal, votes, and starts the controller if it is elected."""

import time
from collections.abc import Callable

from evermesh.launcher.agent.spec import AgentSpec
from evermesh.launcher.contact import read_contact, read_way
from evermesh.launcher.errors import RunNotFound
from evermesh.launcher.processes import start_elected_controller
from evermesh.launcher.run_directory import Run
from evermesh.launcher.succession.office import START_S, Mandate
from evermesh.launcher.succession.protocol import Seat
from evermesh.launcher.succession.replica import DiskMemory, Replica
from evermesh.launcher.succession.server import ReplicaServer
from evermesh.launcher.succession.standing import Standing


class Candidate:
    """The member that the agent of ``spec`` is. ``missing_s``: for how long no controller was heard, None while one is."""

    def __init__(self, spec: AgentSpec, token: str, missing_s: Callable[[], float | None]) -> None:
        """Listens when it returns.

        Raises:
            OSError: there is no room for its memory, or it is not safe there.
        """
        assert spec.journal_folder is not None
        self._spec, self._missing_s = spec, missing_s
        self._elected_until_s = self._reviving_until_s = float("-inf")
        """Monotonic clock: how long others leave it the time for what it has begun."""
        self.term_heard: int | None = None
        """Of the controller that this agent is connected to; None while it is not, or that has not said it yet."""
        self._memory = DiskMemory(spec.journal_folder, token)
        self._replica = Replica(self._memory)
        self._replica.hears = lambda: self.term_heard is not None and self.obeys(self.term_heard)
        self._replica.is_reviving = lambda: self.is_starting or time.monotonic() < self._reviving_until_s
        self._server = ReplicaServer(self._replica, spec.node, spec.address, token)
        self._attempts = 0
        copy_path = spec.journal_folder / "copy.jsonl"
        self._standing = Standing(
            self._replica, self.seat, copy_path, token, missing_s=self._wanted_s, start=self._take_office
        )

    def begin(self) -> None:
        """Look for a controller, or be elected, whenever there is none."""
        self._standing.begin()

    @property
    def seat(self) -> Seat:
        """Where it is asked."""
        return self._server.seat

    @property
    def is_head(self) -> bool:
        """Whether its node is the one that the controller counts to."""
        view = self._replica.word.view
        return self._spec.is_head if view is None or view.leader is None else view.leader == self._spec.node

    @property
    def is_starting(self) -> bool:
        """Whether it was elected, and the controller that it has started then may not be heard yet."""
        return time.monotonic() < self._elected_until_s

    def obeys(self, term: int) -> bool:
        """Whether what is said in ``term`` may be done."""
        return term >= self._replica.word.promised

    def find(self) -> str | None:
        """Where to look for the controller next: as other agents tell, and in the directory of the run, by turns."""
        view = self._replica.word.view
        self._attempts += 1
        told = view.controller if view is not None and self._attempts % 2 else None
        return read_way(self._spec.run, self._spec.node) or told or read_contact(self._spec.run)

    def note_revival(self) -> None:
        """The controller is being started again by this agent: others leave it the time for that, once."""
        if self._reviving_until_s == float("-inf"):
            self._reviving_until_s = time.monotonic() + START_S

    def note_heard(self, term: int | None) -> None:
        """A controller of this term is connected; None: it is gone."""
        self.term_heard = term
        if term is not None:
            self._elected_until_s = self._reviving_until_s = float("-inf")

    def close(self, *, job_is_over: bool) -> None:
        """Take part no more; what it has promised is kept unless the job is over."""
        self._standing.close()
        self._server.close()
        self._memory.close(job_is_over=job_is_over)

    def _wanted_s(self) -> float | None:
        """For how long a controller has been missed that should be there."""
        missing_s = self._missing_s()
        try:
            return missing_s if missing_s is not None and Run(self._spec.run).state().state == "running" else None
        except (RunNotFound, OSError):
            return None  # a controller needs the directory of the run

    def _take_office(self, mandate: Mandate) -> None:
        self._elected_until_s = time.monotonic() + START_S
        start_elected_controller(Run(self._spec.run), mandate)
