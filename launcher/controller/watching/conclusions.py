"""From what detectors say in every window to findings that are concluded once, and go once; no clock of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evermesh.fault.detectors.kinds import COMMUNICATION_HANG, SLOWNESS
from evermesh.fault.events import Finding

_LASTING_S, _LASTING_WINDOWS = 3.0, 4
"""Of slowness, which steps of milliseconds show by chance. Whoever hangs has been waited for long enough."""
_VAGUE_S = 1.5
"""Of what names nobody: what is lost on a way is sent again after 0.2, 0.6 and 1.4 s, and then it is known which way."""
_GONE_S = 1.2
"""For how long nobody says it any more: two windows."""
_PAUSE_S, _GONE_SLOW_S = 2.2, 5.0
"""The same of slowness, before and after it is concluded: it comes and goes with what else a machine does."""

Key = tuple[str, int | None, str | None, tuple[int, int] | None]


def key_of(finding: Finding) -> Key:
    """The same for one finding in different windows, whatever its numbers are by now."""
    place = finding.node if finding.node is not None else finding.group
    return (finding.kind, finding.rank, None if finding.rank is not None else place, finding.link)


class Change(NamedTuple):
    """What a window has brought."""

    begun: tuple[Finding, ...]
    over: tuple[tuple[Finding, float], ...]
    """With seconds since they were first seen."""


@dataclass(slots=True)
class _Seen:
    finding: Finding
    first_s: float
    last_s: float
    windows: int = 1
    is_concluded: bool = False

    @property
    def is_slow(self) -> bool:
        return self.finding.kind in SLOWNESS

    @property
    def is_vague(self) -> bool:
        return self.finding.kind == COMMUNICATION_HANG and self.finding.link is None

    @property
    def is_due(self) -> bool:
        lasted_s = self.last_s - self.first_s
        lasts = lasted_s >= _LASTING_S and self.windows >= _LASTING_WINDOWS
        if not self.is_slow:
            lasts = not self.is_vague or lasted_s >= _VAGUE_S
        return lasts and not self.is_concluded

    def is_gone(self, now_s: float) -> bool:
        limit_s = (_GONE_SLOW_S if self.is_concluded else _PAUSE_S) if self.is_slow else _GONE_S
        return now_s - self.last_s > limit_s


class Conclusions:
    """Takes what is said of a job, window by window."""

    def __init__(self) -> None:
        self._seen: dict[Key, _Seen] = {}

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Those that are concluded and have not gone, the surest first, with their newest numbers."""
        held = (one.finding for one in self._seen.values() if one.is_concluded)
        return tuple(sorted(held, key=lambda finding: -finding.confidence))

    def take(self, said: Sequence[Finding], now_s: float) -> Change:
        """Take what detectors say now, on a clock in seconds."""
        for finding in said:
            key = key_of(finding)
            before = self._seen.get(key)
            if before is None:
                self._seen[key] = _Seen(finding, now_s, now_s)
            elif before.last_s != now_s:
                before.finding, before.last_s, before.windows = finding, now_s, before.windows + 1
        begun = [one for one in self._seen.values() if one.is_due]
        for one in begun:
            one.is_concluded = True
        return Change(tuple(one.finding for one in begun), self._forget(now_s))

    def end(self, now_s: float) -> Change:
        """Nobody is watched any more."""
        over = tuple((one.finding, now_s - one.first_s) for one in self._seen.values() if one.is_concluded)
        self._seen.clear()
        return Change((), over)

    def _forget(self, now_s: float) -> tuple[tuple[Finding, float], ...]:
        gone = {key: one for key, one in self._seen.items() if one.is_gone(now_s)}
        self._seen = {key: one for key, one in self._seen.items() if key not in gone}
        return tuple((one.finding, now_s - one.first_s) for one in gone.values() if one.is_concluded)
