"""An agent that hears no controller: asks the other agents how things are, and stands for election if it is time.

In a thread of its own, which sleeps while there is a controller. What keeps two from being elected is in ``quorum.py``; times
decide only how soon somebody is.
"""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from evermesh.launcher.succession.leader import Asker
from evermesh.launcher.succession.office import START_S, Mandate
from evermesh.launcher.succession.peers import Peers
from evermesh.launcher.succession.protocol import Answer, Install, Peek, Request, Seat, View, Vote
from evermesh.launcher.succession.quorum import elected, newest, turn_of, why_not_stand
from evermesh.launcher.succession.replica import Replica

PATIENCE_S = 2.0
"""Without a controller until an agent stands: a lease."""
_TURN_S = 3.0
"""How much longer each later holder waits: who is alone in standing is elected."""
_LOOK_S = 0.25


class Standing:
    """The agent's part, beside its ``replica``.

    ``missing_s`` tells for how long there has been no controller (None: there is one), ``start`` starts one that was elected.
    """

    def __init__(
        self,
        replica: Replica,
        seat: Seat,
        copy_path: Path,
        token: str,
        *,
        missing_s: Callable[[], float | None],
        start: Callable[[Mandate], None],
    ) -> None:
        self._replica, self._seat, self._copy_path = replica, seat, copy_path
        self._peers = Peers(token)
        self._missing_s, self._start = missing_s, start
        self._told = ""
        self._not_before_s = float("-inf")
        """Monotonic clock: when it stands again at the earliest."""
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="standing", daemon=True)

    def begin(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def close(self) -> None:
        """Stand no more."""
        self._is_closed.set()
        if self._thread.is_alive():
            self._thread.join(START_S)
        self._peers.close()

    def _watch(self) -> None:
        while not self._is_closed.wait(_LOOK_S):
            missing_s = self._missing_s()
            if missing_s is None:
                self._told = ""
            elif missing_s > _LOOK_S and self._replica.word.view is not None:
                try:
                    self._look(missing_s)
                except OSError as error:  # of its own disk
                    self._tell(f"cannot take part in an election: {error}")

    def _look(self, missing_s: float) -> None:
        answers = ask_members(self._replica, self._peers, Peek())
        self._learn(answers)
        view = newest(answer.view for answer in answers.values())
        if view is None or missing_s < PATIENCE_S or time.monotonic() < self._not_before_s:
            return
        why_not = why_not_stand(self._seat.identity, answers)
        if why_not is not None:
            self._tell(f"no controller is heard, but {why_not}")
            return
        wait_s = _TURN_S * turn_of(self._seat.identity, view, answers)
        if missing_s >= PATIENCE_S + wait_s:
            self._not_before_s = time.monotonic() + _TURN_S + wait_s  # two that stood together do not do so again
            self._stand(view, answers)

    def _stand(self, view: View, peeked: Mapping[str, Answer]) -> None:
        term = 1 + max(answer.promised for answer in peeked.values())
        self._tell(f"no controller is heard: standing for term {term}")
        answers = ask_members(self._replica, self._peers, Vote(launch=view.launch, term=term))
        won = elected(self._seat.identity, answers)
        if won is None:
            self._tell(f"not elected for term {term}")
            return
        self._tell(f"elected for term {term} by {sum(answer.accepted for answer in answers.values())} agents")
        self._start(Mandate(term=term, node=self._seat.node, view=won, copy_path=self._copy_path))

    def _learn(self, answers: Mapping[str, Answer]) -> None:
        """Accept the newest view that another agent knows of: it tells where the controller is."""
        view = newest(answer.view for answer in answers.values())
        known = self._replica.word.view
        if view is not None and (known is None or view.version > known.version):
            self._replica.answer(Install(view=view))

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._told = text
            with suppress(OSError):
                print(text, flush=True)


def ask_members(own: Replica, peers: Asker, request: Request) -> dict[str, Answer]:
    """The answers of all members that ``own`` knows of, its own among them; asks those as well that they know of."""
    answers = {own.identity: own.answer(request)}
    asked = {own.identity}
    while True:
        views = [answer.view for answer in answers.values() if answer.view is not None]
        seats = {seat.identity: seat for view in sorted(views, key=lambda view: view.version) for seat in view.members}
        new = [seat for identity, seat in seats.items() if identity not in asked]
        if not new:
            return answers
        asked |= {seat.identity for seat in new}
        answers |= peers.ask(dict.fromkeys(new, request))
