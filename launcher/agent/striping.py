"""What the controller has the keeper of this node do in a stripe, and what the keeper says to that. Waits for nothing."""

import hmac
import time
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel

from evermesh.fault.snapshot.keeper.client import KeeperClient, KeeperLost
from evermesh.fault.snapshot.keeper.standing import Standing, standing_in
from evermesh.launcher.agent.keeping import NodeKeeper
from evermesh.launcher.agent.loop import Loop
from evermesh.launcher.messages import JoinStripe, Keep, KeeperTells, Rebuild

_START_S = 10.0
"""How long a keeper may take to listen, or to give up what it does for an earlier place."""
_AGAIN_S = 0.01
Order = Literal["listen", "join", "leave", "rebuild"]
_Answered = Callable[[dict[str, Any]], None]


class NodeStripe:
    """The keeper of a node as its stripe sees it. Keepers prove to each other that they know a secret, which is made of the
    ``token`` of the job: agents have that, workers do not, and no message holds either."""

    def __init__(
        self, loop: Loop, keeper: NodeKeeper, address: str, token: str, send: Callable[[BaseModel], None]
    ) -> None:
        self._loop, self._keeper, self._address, self._send = loop, keeper, address, send
        self._token = token
        self._asked: Keep | None = None
        self._told: Standing | None = None

    def keep(self, message: Keep) -> None:
        """Have a keeper, and tell where others reach it."""
        self._asked = message
        self._keeper.keep_for(message.launch)
        if not self._keeper.is_there:
            self._tell(KeeperTells(generation=message.generation, about="listen", ok=False, text="it has no keeper"))
        else:
            self._listen(message)

    def join(self, message: JoinStripe) -> None:
        """Have the keeper take its place."""
        values = message.model_dump(exclude={"kind", "generation"})
        launch = self._asked.launch if self._asked is not None else ""
        secret = hmac.digest(self._token.encode(), f"evermesh stripes\0{launch}".encode(), "sha256").hex()
        self._told = None

        def answered(answer: dict[str, Any]) -> None:
            self._pass_on("join", message.generation, message.epoch, answer)

        self._give("join", _START_S, answered, values | {"secret": secret})

    def leave(self) -> None:
        """Have the keeper give up its place, if there is one that may have it."""
        self._asked = None
        if self._keeper.is_alive:
            self._give("leave", _START_S, lambda _: None, {})

    def rebuild(self, message: Rebuild) -> None:
        """Have the keeper do its part."""
        protected = message.protected.model_dump()
        values = {"epoch": message.epoch, "version": protected["version"], "protected": protected}

        def answered(answer: dict[str, Any]) -> None:
            self._pass_on("rebuild", message.generation, message.epoch, answer)

        self._give("rebuild", message.timeout_s, answered, values)

    def look(self, *, had_died: bool) -> None:
        """Called now and then: tell that there is another keeper, or that snapshots are protected, or are not any more."""
        asked = self._asked
        if asked is None:
            return
        if had_died:
            self._listen(asked)
        found = standing_in(self._keeper.area)
        if found is None or (self._told is not None and _meaning(found) == _meaning(self._told)):
            return
        self._told = found
        self._send(
            KeeperTells(
                generation=asked.generation,
                epoch=found.epoch,
                about="standing",
                ok=found.is_protected,
                text=found.text,
                step=found.step,
                data_bytes=found.data_bytes,
                coded_bytes=found.coded_bytes,
                parity_bytes=found.parity_bytes,
            )
        )

    def _listen(self, asked: Keep) -> None:
        def answered(answer: dict[str, Any]) -> None:
            self._pass_on("listen", asked.generation, 0, answer)

        self._give("listen", _START_S, answered, {"host": self._address})

    def _pass_on(
        self, about: Literal["listen", "join", "rebuild"], generation: int, epoch: int, answer: dict[str, Any]
    ) -> None:
        repaired = sum(dict(answer.get("repaired", {})).values())
        text, port = answer.get("fact", ""), answer.get("port")
        self._tell(
            KeeperTells(
                generation=generation,
                epoch=epoch,
                about=about,
                ok=answer["ok"],
                text=text,
                port=port,
                repaired=repaired,
            )
        )

    def _tell(self, message: KeeperTells) -> None:
        self._send(message.model_copy(update={"in_memory": self._keeper.in_memory()}))

    def _give(self, order: Order, timeout_s: float, answered: _Answered, values: dict[str, Any]) -> None:
        _Errand(self._loop, self._keeper, order, time.monotonic() + timeout_s, answered).try_to_tell(values)


class _Errand:
    """One order, over a connection of its own: a later order is not behind it. ``answered`` is called once."""

    def __init__(self, loop: Loop, keeper: NodeKeeper, order: Order, until_s: float, answered: _Answered) -> None:
        self._loop, self._keeper, self._order, self._until_s = loop, keeper, order, until_s
        self._answered = answered
        self._client: KeeperClient | None = None
        self._is_over = False

    def try_to_tell(self, values: dict[str, Any]) -> None:
        """Tell the order as soon as the keeper listens."""
        try:
            self._client = KeeperClient(self._keeper.area)
            self._client.tell(self._order, **values)
        except KeeperLost as error:
            self._close()
            if time.monotonic() > self._until_s:
                self._answer({"ok": False, "fact": str(error)})
            else:
                self._loop.after(_AGAIN_S, lambda: self.try_to_tell(values))
            return
        self._loop.on_readable(self._client.descriptor, self._look)
        self._loop.after(self._until_s - time.monotonic(), self._give_up)

    def _look(self) -> None:
        assert self._client is not None
        try:
            answers = self._client.answers()
        except KeeperLost as error:
            answers = [{"ok": False, "fact": str(error)}]
        if answers:
            self._answer(answers[0])

    def _give_up(self) -> None:
        self._answer({"ok": False, "fact": f"the keeper has not done {self._order!r} in time"})

    def _answer(self, answer: dict[str, Any]) -> None:
        if not self._is_over:
            self._is_over = True
            self._close()
            self._answered(answer)

    def _close(self) -> None:
        if self._client is not None:
            self._loop.forget(self._client.descriptor)
            self._client.close()
            self._client = None


def _meaning(standing: Standing) -> tuple[int, bool, bool]:
    """What is told once per change: not every step."""
    return standing.epoch, standing.is_protected, bool(standing.text)
