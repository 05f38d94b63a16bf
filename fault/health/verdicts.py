"""What a check of a node concluded. Loads nothing but the standard library: every agent needs it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["ok", "warn", "bad"]
"""Nothing is wrong, as far as can be seen; works less well than it could, or may soon not work; not fit for a job."""
_RANKS: dict[State, int] = {"ok": 0, "warn": 1, "bad": 2}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check found on one node. The same check has the same name whenever it is made."""

    check: str
    state: State
    reason: str
    """The fact, with its numbers; of what cannot be read here: that."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What led to it, by name with unit."""
    way_out: str = ""
    """What to do; empty where there is nothing to do."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    @property
    def told(self) -> str:
        """In one line, for a person."""
        return f"{self.check}: {self.reason}.{self.way_out and f' Way out: {self.way_out}.'}"


def worst(verdicts: Iterable[Verdict]) -> State:
    """The worst state among them; ``ok`` if there are none."""
    return max((verdict.state for verdict in verdicts), key=_RANKS.__getitem__, default="ok")


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """For scripts: 0, 1 or 2 for ok, warn and bad, as plugins of monitoring systems end."""
    return _RANKS[worst(verdicts)]


def changed(before: Mapping[str, Verdict], now: Sequence[Verdict]) -> list[Verdict]:
    """Those whose state is another than before; of what was not looked at before, those that are not ok.

    What was not ok before and is not looked at any more counts as ok.
    """
    left = {verdict.check for verdict in now}
    new = [found for found in now if found.state != (before[found.check].state if found.check in before else "ok")]
    gone = [check for check, verdict in before.items() if verdict.state != "ok" and check not in left]
    return [*new, *(Verdict(check, "ok", "is not seen any more") for check in gone)]


def unreadable(check: str, why: str) -> Verdict:
    """The verdict about something that cannot be seen here: no failure."""
    return Verdict(check, "ok", f"not readable here: {why}")
