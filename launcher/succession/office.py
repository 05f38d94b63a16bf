"""How a controller comes into office, for the first time, again, or elected; and how it stays there."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from evermesh.launcher.config import JobConfig
from evermesh.launcher.controller.machine import NodeState
from evermesh.launcher.errors import ResumeRefused, RunNotFound, Superseded
from evermesh.launcher.run_directory import Run
from evermesh.launcher.succession.leader import Leader, Views
from evermesh.launcher.succession.peers import Peers
from evermesh.launcher.succession.protocol import Seat, View
from evermesh.launcher.succession.quorum import ELECTORS
from evermesh.launcher.succession.replica import folder_of

_CONFIRM_S = 1.0
"""How old the consent of a majority may be when something is decided."""
_QUICK_S = 0.2
START_S = 12.0
"""How long an elected controller, or one that is started again, may take until the next election."""
_VIEWS = "members.json"


class Mandate(BaseModel):
    """What an elected controller is told by the agent that was elected."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    term: int
    node: str
    view: View
    """That it takes over."""
    copy_path: Path
    """The copy of the journal that it goes on from."""


class Watched(Protocol):
    """What is known of a node."""

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> NodeState: ...

    @property
    def seat(self) -> Seat | None: ...

    @property
    def is_head(self) -> bool: ...


class Office:
    """The term of this controller. ``superseded`` is called, and must not return, as soon as there is a higher one."""

    def __init__(self, leader: Leader, reason: str, superseded: Callable[[Superseded], None]) -> None:
        self._leader, self._superseded = leader, superseded
        self.reason = reason
        """Why it is in office."""
        self._confirmed_s = float("-inf")

    @property
    def term(self) -> int:
        return self._leader.view.term

    @property
    def node(self) -> str | None:
        """The node that shares its machine; None while that is not known, and where none does."""
        return self._leader.view.leader

    def begin(self) -> None:
        """Come into office: a majority of the agents obeys from then on.

        Raises:
            NotReplicated: too few agents answer.
        """
        with self._obeyed():
            self._leader.confirm()

    def meet(self, seat: Seat | None) -> None:
        """An agent says where it is asked."""
        if seat is not None:
            self._leader.meet(seat)

    def commit(self, line: str) -> None:
        """Have the next line of the journal copied; it may be acted upon when this returns.

        Raises:
            NotReplicated: it may not.
        """
        with self._obeyed():
            self._leader.commit(line)

    def retract(self) -> None:
        """The last line could not be written into the journal itself."""
        self._leader.retract()

    def attend(self, nodes: Sequence[Watched]) -> bool:
        """Make sure of the office, and have all agents that are there take part. Called before anything is decided.

        False if that took so long that what agents have said meanwhile has to be heard first.

        Raises:
            NotReplicated: nothing may be decided now.
        """
        with self._obeyed():
            now_s = time.monotonic()
            if now_s - self._confirmed_s >= _CONFIRM_S:
                self._leader.confirm()
                self._confirmed_s = now_s
            self._leader.tend(self._present(nodes), self._head(nodes))
            return time.monotonic() - now_s < _QUICK_S

    def check_nobody_else(self, directory: Path) -> None:
        """Called before the end of a job is written down without the consent of the agents: not if another is in office."""
        with self._obeyed():
            _check_newest(directory, self._leader.view)

    @contextmanager
    def _obeyed(self) -> Iterator[None]:
        try:
            yield
        except Superseded as error:
            self._superseded(error)
            raise

    def _present(self, nodes: Sequence[Watched]) -> list[Seat]:
        """Seats of the nodes that are not lost; of one that was adopted, and has not spoken yet, the one that it had."""
        there = [node for node in nodes if node.state in ("ready", "cut off")]
        seats = [node.seat or self._leader.view.seat_of(node.name) for node in there]
        return [seat for seat in seats if seat is not None]

    def _head(self, nodes: Sequence[Watched]) -> str | None:
        known = self._leader.view.leader
        return known or next((node.name for node in nodes if node.is_head and node.state == "ready"), None)


def take_office(
    directory: Path,
    views: Views,
    lines: Sequence[str],
    token: str,
    *,
    copies: int,
    superseded: Callable[[Superseded], None],
) -> Office:
    """The office of the controller that ``views`` tell of; the journal so far is ``lines``."""
    leader = Leader(views, lines, Peers(token), copies, lambda found: _write_views(directory, found))
    before = (views.before.leader if views.before is not None else None) or "the first controller"
    reason = "launched" if views.before is None else f"{views.view.leader} takes over: nothing is heard from {before}"
    return Office(leader, reason, superseded)


def first_views(launch: int, url: str) -> Views:
    """Of the first controller of a launch: nobody takes part yet."""
    return Views(
        view=View(launch=launch, term=1, number=0, leader=None, machine=_machine(), controller=url), before=None
    )


def views_again(directory: Path, launch: int | None, term: int, url: str) -> Views:
    """Of a controller that is started again on its machine, in the same term; ``term`` is that of the journal.

    Raises:
        RunNotFound: nothing tells who takes part; agents that hold copies of the journal will elect another.
        ResumeRefused: the last one was on another machine.
    """
    found = read_views(directory)
    if found is None or (found.view.launch, found.view.term) != (launch, term):
        raise RunNotFound(
            f"{directory / _VIEWS} and the journal do not tell together which agents take part, so this controller cannot go "
            "on. Those that hold copies of the journal elect another; else start again with evermesh resume."
        )
    if found.view.machine != _machine():
        raise ResumeRefused(
            f"the controller of term {found.view.term} was on another machine, so only the agents can tell whether it lives: "
            "they elect another, unless too few are left. Then stop what is left of the job, and resume it."
        )
    return found.model_copy(update={"view": found.view.model_copy(update={"controller": url})})


def elected_views(mandate: Mandate, url: str) -> Views:
    """Of a controller that has been elected."""
    changed = {"term": mandate.term, "number": 0, "leader": mandate.node, "machine": _machine()}
    changed |= {"controller": url, "holders": ()}
    return Views(view=mandate.view.model_copy(update=changed), before=mandate.view)


def can_be_succeeded(nodes: int, copies: int) -> bool:
    """Whether agents of a job with so many nodes, spares included, elect another controller if need be."""
    return copies > 0 and nodes >= ELECTORS


def journal_folder(run: Run, config: JobConfig, node: str) -> Path | None:
    """Where the agent of ``node`` keeps its copy of the journal; None: nobody could take over in this job."""
    if not can_be_succeeded(config.nodes + config.spares, config.journal_copies):
        return None
    return folder_of(run.directory, node, config.journal_folder)


def election_s(config: JobConfig) -> float:
    """Seconds that the agents of a job may need to elect another controller; 0: they elect none."""
    return START_S if can_be_succeeded(config.nodes + config.spares, config.journal_copies) else 0.0


def read_views(directory: Path) -> Views | None:
    """What the last controller of a run wrote down; None if that cannot be read."""
    with suppress(OSError, ValidationError):
        return Views.model_validate_json((directory / _VIEWS).read_bytes())
    return None


def _machine() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _check_newest(directory: Path, view: View) -> None:
    """Raises Superseded if another controller has written that it is in office."""
    found = read_views(directory)
    if found is not None and (found.view.launch, found.view.term) > (view.launch, view.term):
        raise Superseded(view.term, found.view.term)


def _write_views(directory: Path, views: Views) -> None:
    _check_newest(directory, views.view)
    new = directory / f"{_VIEWS}.{views.view.term}.new"
    with new.open("w") as file:
        file.write(views.model_dump_json())
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, directory / _VIEWS)
