"""Members and controllers without processes, disks and sockets: what is durable is kept, everything else may be lost."""

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence

from evermesh.launcher.succession.copy import Chain
from evermesh.launcher.succession.leader import Leader, Views
from evermesh.launcher.succession.protocol import Answer, Peek, Request, Seat, View, Vote
from evermesh.launcher.succession.quorum import elected
from evermesh.launcher.succession.replica import Replica, Word
from evermesh.launcher.succession.standing import ask_members


class Crash(Exception):
    """The controller was killed at this point."""


class MemoryOnly:
    """A memory that a test keeps through crashes."""

    def __init__(self, identity: str) -> None:
        self.word = Word(run="run", identity=identity)
        self.chain = Chain()

    def keep(self, word: Word) -> None:
        self.word = word

    def write(self, after: int, lines: Sequence[str]) -> None:
        self.chain.cut(after)
        self.chain.extend(lines)


class Network:
    """Passes requests to members; ``rng`` decides which are lost, on the way there or back, and when the sender is killed."""

    def __init__(self, rng: random.Random) -> None:
        self.replicas: dict[str, Replica] = {}
        self.cut: set[tuple[str, str]] = set()
        """(sender's node, identity of a member)."""
        self.rng = rng
        self.loss = self.crash = 0.0

    def ask(self, sender: str, requests: Mapping[Seat, Request]) -> dict[str, Answer]:
        answers = {}
        for seat, request in requests.items():
            if self.rng.random() < self.crash:
                raise Crash
            if (sender, seat.identity) in self.cut or seat.identity not in self.replicas:
                continue
            if self.rng.random() < self.loss:
                continue
            answer = self.replicas[seat.identity].answer(request)
            if self.rng.random() >= self.loss:
                answers[seat.identity] = answer
        return answers


class From:
    """The network as a node sees it."""

    def __init__(self, network: Network, sender: str) -> None:
        self.network, self.sender = network, sender

    def ask(self, requests: Mapping[Seat, Request]) -> dict[str, Answer]:
        return self.network.ask(self.sender, requests)

    def responsive(self, seats: Iterable[Seat]) -> list[Seat]:
        return list(seats)


class Office:
    """A controller and what it has on disk; killed and started again on its machine it is the same office."""

    def __init__(self, network: Network, node: str, views: Views, lines: Sequence[str], copies: int = 2) -> None:
        self.network, self.node, self.copies = network, node, copies
        self.views, self.lines = views, list(lines)
        self.leader: Leader
        self.start()

    @property
    def term(self) -> int:
        return self.views.view.term

    def start(self) -> None:
        self.leader = Leader(self.views, self.lines, From(self.network, self.node), self.copies, self._keep)

    def commit(self, line: str, *, is_written: bool = True) -> bool:
        """Whether ``line`` may be acted upon: not if its own disk was full, after others had it already."""
        self.leader.commit(line)
        if is_written:
            self.lines.append(line)
        else:
            self.leader.retract()
        return is_written

    def _keep(self, views: Views) -> None:
        self.views = views


def first_office(network: Network) -> Office:
    view = View(launch=1, term=1, number=0, leader="node-0", machine="m", controller="http://first")
    return Office(network, "node-0", Views(view=view, before=None), [])


_numbers = itertools.count()


def member(network: Network, node: str) -> Seat:
    """A new member, with a new disk."""
    identity = f"{node}.{next(_numbers)}"
    network.replicas[identity] = Replica(MemoryOnly(identity))
    return Seat(identity=identity, node=node, url=f"ws://{identity}")


def next_term(network: Network, seat: Seat) -> int:
    """The term that ``seat`` would stand for, as far as it hears from others now."""
    own = network.replicas[seat.identity]
    return 1 + max(answer.promised for answer in ask_members(own, From(network, seat.node), Peek()).values())


def stand(network: Network, seat: Seat, term: int) -> tuple[View, list[str]] | None:
    """``seat`` stands for election, whether or not there is a reason to; what it goes on from if it is elected."""
    own = network.replicas[seat.identity]
    vote = Vote(launch=own.word.launch, term=term)
    view = elected(seat.identity, ask_members(own, From(network, seat.node), vote))
    return None if view is None else (view, list(own._memory.chain.lines))
