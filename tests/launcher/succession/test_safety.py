"""Crashes, partitions, lost messages, lost disks: two never hold one term, no entry that was acted upon is ever lost.

The real members, controllers and rules; only disks and sockets are of the test. Each seed is a walk through what may happen
to a job, in any order; ``WALKS=100000`` in the environment takes more of them.
"""

import os
import random
from collections import Counter
from collections.abc import Callable

import pytest

from evermesh.launcher.errors import NotReplicated, Superseded
from evermesh.launcher.succession.leader import Views
from evermesh.launcher.succession.protocol import Seat
from tests.launcher.succession.worlds import Crash, Network, Office, first_office, member, next_term, stand

WALKS = int(os.environ.get("WALKS", "900"))
STEPS = 120


class Walk:
    """One job; controllers that were superseded, killed or stopped may go on at any later time."""

    def __init__(self, seed: int, size: int) -> None:
        self.rng = random.Random(seed)
        self.network = Network(self.rng)
        self.seats: list[Seat] = [member(self.network, f"node-{number}") for number in range(size)]
        self.offices: list[Office] = [first_office(self.network)]
        self.winners: dict[int, str] = {1: "node-0"}
        self.acted: dict[int, str] = {}
        """By number of the line: what some controller acted upon."""
        self.highest = 1
        """Term of the newest controller that has been in force."""
        self.lines = 0
        self.terms: dict[str, int] = {}
        """By identity: the term that it is about to stand for."""
        self.seen: Counter[str] = Counter()

    def go(self) -> None:
        self.tend(self.offices[0], list(self.seats))
        choices: dict[Callable[[], None], int] = {
            self.decide: 40, self.tend_any: 20, self.elect: 15, self.divide: 8, self.heal: 8, self.trouble: 6,
            self.lose_disk: 2, self.restart: 2,
        }  # fmt: skip
        for step in self.rng.choices(list(choices), list(choices.values()), k=STEPS):
            step()

    def in_force(self, office: Office) -> None:
        """It has just had the consent that it needs before it decides."""
        assert office.term >= self.highest, "a controller acts although a later one is in office"
        self.highest = office.term

    def decide(self) -> None:
        office = self.any_office()
        self.lines += 1
        try:
            is_written = self.rng.random() < 0.9
            if not office.commit(f"{office.term}: {self.lines}", is_written=is_written):
                return
        except (Superseded, Crash):
            office.start()  # its machine has all on disk, and may start it again: that must not get anywhere if superseded
            return
        except NotReplicated:
            return
        self.in_force(office)
        number = len(office.lines)
        assert number not in self.acted, "a line that was acted upon has been replaced"
        self.acted[number] = office.lines[-1]
        for known, line in self.acted.items():
            assert office.lines[known - 1] == line, "a line that was acted upon is lost"
        self.seen["decided"] += 1

    def tend_any(self) -> None:
        present = list(self.seats)
        if self.rng.random() < 0.5:
            present = [seat for seat in present if self.rng.random() < 0.7]
        self.tend(self.any_office(), present)

    def tend(self, office: Office, present: list[Seat]) -> None:
        try:
            if self.rng.random() < 0.5:
                office.leader.confirm()
                self.in_force(office)
            before = office.leader.view
            office.leader.tend(present, office.node)
            if office.leader.view != before:
                self.in_force(office)
        except (Superseded, Crash):
            office.start()
        except NotReplicated:
            self.seen["too few"] += 1

    def elect(self) -> None:
        seat = self.rng.choice(self.seats)
        try:
            if self.rng.random() < 0.5 or seat.identity not in self.terms:  # else what it saw some time ago
                self.terms[seat.identity] = next_term(self.network, seat)
            term = self.terms[seat.identity] if self.rng.random() < 0.7 else 0
            won = stand(self.network, seat, term) if term else None
        except Crash:
            return
        if won is None:
            return
        view, lines = won
        assert term not in self.winners, f"{self.winners[term]} and {seat.node} were both elected for term {term}"
        self.winners[term] = seat.node
        for known, line in self.acted.items():
            assert lines[known - 1 : known] == [line], "who was elected lacks a line that was acted upon"
        self.seen["elected"] += 1
        changed = {"term": term, "number": 0, "leader": seat.node, "holders": ()}
        office = Office(self.network, seat.node, Views(view=view.model_copy(update=changed), before=view), lines)
        self.offices.append(office)
        self.tend(office, list(self.seats))

    def divide(self) -> None:
        """Two sides that do not hear each other; sometimes only one way."""
        side = {seat.node for seat in self.seats if self.rng.random() < 0.5}
        for one in self.seats:
            for other in self.seats:
                if (one.node in side) != (other.node in side) and self.rng.random() < 0.9:
                    self.network.cut.add((one.node, other.identity))

    def heal(self) -> None:
        self.network.cut.clear()
        self.network.loss = self.network.crash = 0.0

    def trouble(self) -> None:
        self.network.loss, self.network.crash = self.rng.choice([(0.2, 0.0), (0.0, 0.1), (0.2, 0.05)])

    def lose_disk(self) -> None:
        """A node comes back with another disk: it has forgotten what it promised."""
        number = self.rng.randrange(len(self.seats))
        del self.network.replicas[self.seats[number].identity]
        self.seats[number] = member(self.network, f"node-{number}")

    def restart(self) -> None:
        self.any_office().start()

    def any_office(self) -> Office:
        """Mostly the newest."""
        return self.offices[-1] if self.rng.random() < 0.6 else self.rng.choice(self.offices[-4:])


@pytest.mark.parametrize("size", [3, 4, 5])
def test_two_never_hold_a_term_and_nothing_that_was_acted_upon_is_lost(size: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(WALKS // 3):
        walk = Walk(seed, size)
        try:
            walk.go()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {size} nodes: {error}") from error
        seen += walk.seen
    assert seen["elected"] > WALKS / 3, seen  # the walks do go where it is dangerous
    assert seen["decided"] > 2 * WALKS, seen
