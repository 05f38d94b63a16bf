"""The office of one controller: its entries go to all holders before it acts, and its views to a majority before they count.

Pure but for what ``asker`` and ``keep`` do; the rules and the reason why no entry is lost are in ``quorum.py``. No thread
of its own: a request takes a round trip and a write to disk, or the time that a dead member is waited for.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from evermesh.launcher.errors import NotReplicated, Superseded
from evermesh.launcher.succession.copy import EMPTY, Chain
from evermesh.launcher.succession.protocol import Answer, Append, Confirm, Install, Request, Seat, View
from evermesh.launcher.succession.quorum import elects, has_majority, is_installed


class Asker(Protocol):
    """Passes requests to members."""

    def ask(self, requests: Mapping[Seat, Request]) -> dict[str, Answer]:
        """The answers that came, by identity; all are asked at the same time."""

    def responsive(self, seats: Iterable[Seat]) -> list[Seat]:
        """Those of ``seats`` that were not silent a moment ago."""


class Views(BaseModel):
    """What a controller that is started again on the same machine has to know of the views of its term."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    view: View
    """The last that members were told of, or were about to be."""
    before: View | None
    """The last that was in force for certain; None: none was."""


class Leader:
    """Holds the term of ``views.view``. ``keep`` writes views down before members hear of them.

    Raises, in every method that asks members:
        Superseded: a member has promised a higher term: nothing may be done any more, by this controller, ever.
        NotReplicated: too few members answer; what was asked for has not happened, and may be tried again.
    """

    def __init__(
        self, views: Views, lines: Sequence[str], asker: Asker, copies: int, keep: Callable[[Views], None]
    ) -> None:
        self._view, self._before = views.view, views.before
        self._chain = Chain(lines)
        self._asker, self._copies, self._keep = asker, copies, keep
        self._seats = {seat.identity: seat for seat in (*self._old_members(), *views.view.members)}
        self._is_in_force = not views.view.members

    @property
    def view(self) -> View:
        return self._view

    def meet(self, seat: Seat) -> None:
        """A member says where it is reached now."""
        self._seats[seat.identity] = seat

    def commit(self, line: str) -> None:
        """Give ``line``, the next of the journal, to all holders; it may be acted upon when this returns."""
        self._come_into_force()
        self._chain.extend([line])
        try:
            holders = [self._seats[identity] for identity in self._view.holders]
            if len(self._bring_up(holders)) < len(holders):
                self._install(self._view.members)  # with other holders, which have the line as well
        except (Superseded, NotReplicated, OSError):
            self._chain.cut(len(self._chain) - 1)
            raise

    def retract(self) -> None:
        """The last line could not be written where the controller itself keeps it: it does not count."""
        self._chain.cut(len(self._chain) - 1)

    def confirm(self) -> None:
        """Return if this is still the controller."""
        self._come_into_force()
        view = self._view
        if not elects(view):
            return
        request = Confirm(launch=view.launch, term=view.term)
        seats = [self._seats[seat.identity] for seat in view.members]
        quick = self._asker.responsive(seats)
        accepted = self._ask(dict.fromkeys(quick, request))
        if not has_majority(view, accepted):
            accepted |= self._ask(dict.fromkeys([seat for seat in seats if seat not in quick], request))
        if not has_majority(view, accepted):
            raise self._too_few(view, accepted)

    def tend(self, present: Sequence[Seat], leader: str | None) -> None:
        """Have those who are there be the members, one change at a time, and as many of them holders as there should be."""
        self._come_into_force()
        for seat in present:
            self.meet(seat)
        if leader != self._view.leader:
            self._install(self._view.members, leader)
        while (members := self._next_members(present)) is not None:
            self._install(members)
        wanted = {seat.identity for seat in self._candidates(self._view.members)[: self._copies]}
        if elects(self._view) and wanted and wanted != set(self._view.holders):
            self._install(self._view.members)

    def _next_members(self, present: Sequence[Seat]) -> tuple[Seat, ...] | None:
        """The members after the next change, which is of one member or of where members are reached; None: no change."""
        members = self._view.members
        wanted = {seat.identity: seat for seat in present}
        gone = [seat for seat in members if seat.identity not in wanted]
        if gone:
            return tuple(seat for seat in members if seat != gone[0])
        new = [seat for seat in present if seat.identity not in self._view.identities]
        if new:
            return (*members, new[0])
        moved = tuple(wanted[seat.identity] for seat in members)
        return moved if moved != members else None

    def _come_into_force(self) -> None:
        if not self._is_in_force:
            self._install(self._view.members)

    def _install(self, members: tuple[Seat, ...], leader: str | None = None) -> None:
        """Put the next view in force: its holders get the whole journal first, then a majority hears of it."""
        members = tuple(self._seats[seat.identity] for seat in members)
        changed = {"number": self._view.number + 1, "members": members, "leader": leader or self._view.leader}
        self._view, self._is_in_force = self._view.model_copy(update={**changed, "holders": ()}), False
        if elects(self._view):
            whole = self._bring_up(self._candidates(members)[: self._copies])
            holders = tuple(seat.identity for seat in members if seat.identity in whole)
            self._view = self._view.model_copy(update={"holders": holders})
        self._keep(Views(view=self._view, before=self._before))
        asked = {seat.identity: self._seats[seat.identity] for seat in (*members, *self._old_members())}
        accepted = self._ask(dict.fromkeys(asked.values(), Install(view=self._view)))
        if not is_installed(self._view, self._before, accepted):
            raise self._too_few(self._view, accepted)
        self._before, self._is_in_force = self._view, True
        self._keep(Views(view=self._view, before=self._view))

    def _old_members(self) -> tuple[Seat, ...]:
        return self._before.members if self._before is not None else ()

    def _candidates(self, members: Sequence[Seat]) -> list[Seat]:
        """Members that can hold a copy, the best first: those that answer, and lie on other machines than the controller."""
        seats = self._asker.responsive(self._seats[seat.identity] for seat in members)
        return sorted(seats, key=lambda seat: seat.node == self._view.leader)

    def _bring_up(self, seats: Sequence[Seat]) -> frozenset[str]:
        """Give the journal to these; returns who has all of it now."""
        if not seats:
            return frozenset()
        newest = max(0, len(self._chain) - 1)
        whole = self._ask(dict.fromkeys(seats, self._append(newest)))
        behind = [seat for seat in seats if seat.identity not in whole]
        behind = self._asker.responsive(behind) if newest else []
        return whole | (self._ask(dict.fromkeys(behind, self._append(0))) if behind else frozenset())

    def _append(self, after: int) -> Append:
        digest = self._chain.digest(after) if after else EMPTY
        view = self._view
        return Append(
            launch=view.launch, term=view.term, after=after, digest=digest, lines=tuple(self._chain.lines[after:])
        )

    def _ask(self, requests: Mapping[Seat, Request]) -> frozenset[str]:
        """Who has accepted."""
        answers = self._asker.ask(requests) if requests else {}
        for answer in answers.values():
            if (answer.launch, answer.promised) > (self._view.launch, self._view.term):
                raise Superseded(self._view.term, answer.promised)
        return frozenset(identity for identity, answer in answers.items() if answer.accepted)

    def _too_few(self, view: View, accepted: frozenset[str]) -> NotReplicated:
        found = len(view.identities & accepted)
        return NotReplicated(
            f"only {found} of {len(view.members)} agents answer the controller of term {view.term}, so another may have been "
            "elected: nothing is done until more than half answer."
        )
