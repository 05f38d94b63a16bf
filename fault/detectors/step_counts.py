"""How many collectives ranks did in each step: where all do the same ones, only that shows who left one out."""

from collections.abc import Iterator, Sequence

import numpy as np

from evermesh.fault.detectors import kinds
from evermesh.fault.detectors.joining import Joined, Survey
from evermesh.fault.events import Finding
from evermesh.fault.recorder.record import OPERATIONS, PHASES

_TRAIN = PHASES.index("train")
_SURE = 0.99


def strayed_by_steps(joined: Joined, survey: Survey, group: int) -> Iterator[Finding]:
    """Ranks that did one collective less, or more, than others in one step, and have been off ever since.

    Tags that two threads set race, which shows as one less here and one more there; that blames nobody.
    """
    traces = [trace for trace in joined.members[group].tolist() if trace >= 0]
    counts = _counts(joined, survey, group, traces)
    if counts is None:
        return
    steps, table = counts
    usual = _usual(table)
    if usual is None:
        return
    for trace, row in zip(traces, table, strict=True):
        off = np.flatnonzero(row != usual)
        if len(off) != 1 or not 0 < int(off[0]) < len(usual) - 1:  # what a race took may have been given beyond
            continue
        difference, step = int(row[off[0]] - usual[off[0]]), int(steps[off[0]])
        state, name = joined.traces[trace], joined.groups[group].name
        did = f"{-difference} fewer" if difference < 0 else f"{difference} more"
        yield Finding(
            kind=kinds.SKIPPED if difference < 0 else kinds.EXTRA,
            rank=state.rank,
            node=joined.node(trace),
            group=name,
            step=step,
            text=f"{joined.where(trace)} did {did} collectives in group {name} in step {step} than others, "
            f"unnoticed: since then it takes part in collectives of other steps",
            evidence={"off_by": -difference, "collectives": int(row[off[0]]), "of_others": int(usual[off[0]])},
            confidence=_SURE,
        )


def _counts(joined: Joined, survey: Survey, group: int, traces: Sequence[int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps that all members have behind them, and array [members, steps]: collectives of each in them."""
    whole = survey.is_over()[traces].all(axis=0)
    steps = survey.first_step + np.flatnonzero(whole)
    if len(steps) < 3 or len(traces) < 2:
        return None
    table = np.zeros((len(traces), len(steps)), np.int64)
    for index, trace in enumerate(traces):
        records = joined.traces[trace].records
        local = np.flatnonzero(joined.local_groups[trace] == group)
        chosen = np.isin(records["group"], local) & (records["operation"] < OPERATIONS.index("send"))
        chosen &= records["phase"] == _TRAIN
        of_step = records["step"][chosen].astype(np.int64) - survey.first_step
        of_step = of_step[(of_step >= 0) & (of_step < survey.num_steps)]
        table[index] = np.bincount(of_step, minlength=survey.num_steps)[whole]
    return steps, table


def _usual(table: np.ndarray) -> np.ndarray | None:
    """Collectives of most members in every step; of two members, those of all other steps; None where that is unclear."""
    if len(table) > 2:
        usual = np.median(table, axis=0)
        is_clear = ((table == usual).sum(axis=0) * 2 > len(table)).all()
        return usual.astype(np.int64) if is_clear else None
    values, counts = np.unique(table, return_counts=True)
    if counts.max() * 4 < 3 * table.size:
        return None
    return np.full(table.shape[1], values[counts.argmax()])
