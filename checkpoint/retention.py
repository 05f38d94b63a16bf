"""Which checkpoints stay: a policy is a pure function from what there is to what is kept."""

import time
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Retention:
    """Rules for the checkpoints of a directory; what any of them keeps stays."""

    last: int | None = 2
    """The newest so many, at least one; None: all."""
    every: int | None = None
    """Those whose step is a multiple of it; None: no such rule."""
    younger_than_s: float | None = None
    """Those that were written less than so many seconds ago; None: no such rule."""

    def kept(self, written_s: Mapping[int, float], step: int, now_s: float) -> set[int]:
        """The steps that stay.

        Args:
            written_s: of every checkpoint, by step: when it was written, seconds since 1970.
            step: the newest of the run. Steps above it come from a run that was taken back; they count as the oldest.
            now_s: seconds since 1970.
        """
        order = sorted(written_s, key=lambda s: (s > step, -s))
        kept = set(order if self.last is None else order[: max(self.last, 1)])
        if self.every is not None:
            kept |= {found for found in order if found % self.every == 0}
        if self.younger_than_s is not None:
            kept |= {found for found in order if now_s - written_s[found] < self.younger_than_s}
        return kept

    def kept_now(self, written_s: Mapping[int, float], step: int) -> set[int]:
        """The steps that stay, by the clock of this machine."""
        return self.kept(written_s, step, time.time())


def as_retention(keep: "int | Retention | None") -> Retention:
    """A number is that of the newest; None keeps all."""
    return keep if isinstance(keep, Retention) else Retention(last=keep)
