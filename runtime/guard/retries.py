"""Samples of skipped steps: they wait, are tried again in a later batch, and are narrowed down to those that are bad.

Sequences that were skipped together are a *group*. It comes back whole in a step that is drawn for it, in front of fresh
sequences; skipped again, it is halved, so that a bad sequence is found by bisection; a single one that has been tried again
often enough is set aside. A batch holds one group at most, so that two of them never take the blame for each other. An
innocent sequence is set aside only if each of its tries was in a batch that was bad for another reason.

The outcome of a step is known only when the next batch has been drawn already. So a group is never due before the second next
step, and what a batch holds does not depend on where a run was stopped.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evermesh.runtime.data import Batch, SequenceRef

NOTICE = 2
"""Least steps from a skipped step to that in which its samples are tried again."""


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that are tried again together."""

    due: int
    """The step whose batch they are in."""
    tries: int
    """Times that they, or the larger groups they were in, have been tried again in vain."""
    sequences: tuple[SequenceRef, ...]


class RetryQueue:
    """The groups that wait, and the sequences that were set aside.

    Args:
        seed: of the run; with the step it decides when a group comes back.
        steps: of the whole run: a group comes back before its end, if there is a step left that has none.
        max_retries: see ``GuardConfig``.
        within: likewise.
    """

    def __init__(self, seed: int, steps: int, max_retries: int, within: int) -> None:
        self._seed, self._steps, self._max_retries, self._within = seed, steps, max_retries, within
        self.groups: tuple[Group, ...] = ()
        self.set_aside: tuple[SequenceRef, ...] = ()

    @property
    def num_waiting(self) -> int:
        """Sequences that wait to be tried again."""
        return sum(len(group.sequences) for group in self.groups)

    def due(self, step: int) -> tuple[SequenceRef, ...]:
        """What the batch of ``step`` begins with."""
        return next((group.sequences for group in self.groups if group.due == step), ())

    def passed(self, step: int) -> None:
        """``step`` was accepted: what was tried again in it is trained."""
        if self.due(step):
            self.groups = tuple(group for group in self.groups if group.due != step)

    def failed(self, step: int, batch: Batch) -> tuple[SequenceRef, ...]:
        """``step``, which trained ``batch``, was skipped: what was in it waits again. Returns what is not tried again.

        That is also what was set aside before, and comes again with another epoch.
        """
        again = next((group for group in self.groups if group.due == step), None)
        self.passed(step)
        fresh = batch.sequences[batch.num_again :]
        known = set(fresh if self._max_retries == 0 else self.set_aside)
        gone = tuple(sequence for sequence in fresh if sequence in known)
        if again is not None:
            gone += self._try_again(step, again)
        self._wait(step, 0, [sequence for sequence in fresh if sequence not in known])
        self.set_aside = tuple(dict.fromkeys((*self.set_aside, *gone)))
        return gone

    def _try_again(self, step: int, group: Group) -> tuple[SequenceRef, ...]:
        tries, number = group.tries + 1, len(group.sequences)
        if self._max_retries == 0 or (number == 1 and tries >= self._max_retries):
            return group.sequences
        half = (number + 1) // 2
        self._wait(step, tries, group.sequences[:half])
        self._wait(step, tries, group.sequences[half:])
        return ()

    def _wait(self, step: int, tries: int, sequences: Sequence[SequenceRef]) -> None:
        if sequences:
            self.groups += (Group(self._draw(step), tries, tuple(sequences)),)

    def _draw(self, step: int) -> int:
        """A step in which a group of the skipped ``step`` can come back: the drawn one, or the next that has none yet.

        Behind the end of the run only if every step before it has one.
        """
        key = f"{self._seed}/{step}/{len(self.groups)}".encode()
        drawn = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % self._within
        first, taken = step + NOTICE, {group.due for group in self.groups}
        left = max(0, self._steps - first + 1)
        drawn = drawn % left if left else drawn
        in_time = (*range(first + drawn, first + left), *range(first, first + min(drawn, left)))
        behind = range(first + left, first + left + len(taken) + 1)
        return next(due for due in (*in_time, *behind) if due not in taken)


def names_of(sequences: Iterable[SequenceRef], most: int = 8) -> str:
    """The first ``most`` of them by name, and how many more there are."""
    names = [sequence.identity for sequence in sequences]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


__all__ = ["NOTICE", "Group", "RetryQueue", "names_of"]
