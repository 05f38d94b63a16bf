"""How long every rank computes in a step, next to those that do the same: no clocks are compared.

What a rank does while none of its collectives is under way is its own; that it waits inside them for others is not.
Ranks are compared where their pipeline stage and all that they did in the step, sizes included, are the same. Where a
plan says how much work each had, all ranks of a stage are compared, by the ratio of the two.
"""

from dataclasses import dataclass

import numpy as np

from evermesh.fault.detectors import kernels
from evermesh.fault.detectors.context import Context
from evermesh.fault.detectors.joining import Joined, Survey
from evermesh.fault.mixing import MIXER
from evermesh.fault.recorder.record import OPERATIONS

_LOOKED_AT = 256
"""Records of a rank that show whether a group without an axis is a pipeline."""
_EXACT = 16
"""Up to so many peers the median leaves out the rank that is compared."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Time of every rank and step next to the median of its peers."""

    ratio: np.ndarray
    """Array [traces, steps]; not a number where a rank has no peers in the step, or its time is not known."""
    excess_s: np.ndarray
    """Array [traces, steps]: by how much it was longer."""
    peers: np.ndarray
    """Array [traces]: with how many others it was compared, in the step with most."""


def stages_of(joined: Joined) -> np.ndarray:
    """Array [traces]: pipeline stage of every rank: its place in a group of axis ``pp``, or in one that sends messages and
    has no axis."""
    stages = np.zeros(len(joined.traces), np.int64)
    for group, members in enumerate(joined.members):
        axis = joined.groups[group].axis
        if axis == "pp" or (not axis and _sends(joined, group, members)):
            present = members >= 0
            stages[members[present]] = np.flatnonzero(present)
    return stages


def _sends(joined: Joined, group: int, members: np.ndarray) -> bool:
    trace = next((int(trace) for trace in members if trace >= 0), None)
    if trace is None:
        return False
    records = joined.traces[trace].records[:_LOOKED_AT]
    local = np.flatnonzero(joined.local_groups[trace] == group)
    return bool((np.isin(records["group"], local) & (records["operation"] >= OPERATIONS.index("send"))).any())


def compare(joined: Joined, survey: Survey, context: Context, column: int) -> Compared:
    """Compare ``column`` of the steps, TRAIN_NS or INPUT_NS."""
    times_s = survey.of_step[:, :, column] / 1e9
    known = survey.is_whole() & (survey.of_step[:, :, kernels.UNSEEN] == 0)
    planned = _planned(joined, survey, context) if column == kernels.TRAIN_NS else None
    stages = stages_of(joined)
    ratio, excess_s = np.full(times_s.shape, np.nan), np.full(times_s.shape, np.nan)
    peers = np.zeros(times_s.shape, np.int64)
    for step in range(survey.num_steps):
        present = np.flatnonzero(known[:, step])
        keys = stages[present].astype(np.uint64) * MIXER
        if planned is None:
            keys += survey.signatures[present, step]
        _, classes = np.unique(keys, return_inverse=True)
        order = np.argsort(classes.ravel(), kind="stable")
        bounds = np.flatnonzero(np.diff(classes.ravel()[order])) + 1
        for alike in np.split(present[order], bounds):
            if planned is not None:  # what nobody planned, or without work, tells nothing of who is slow
                alike = alike[planned[alike, step] > 0]
            if len(alike) < 2:
                continue
            work = planned[alike, step] if planned is not None else np.ones(len(alike))
            per_work = times_s[alike, step] / work
            usual = _median_of_others(per_work)
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio[alike, step] = np.where(usual > 0, per_work / usual, np.nan)
            excess_s[alike, step] = (per_work - usual) * work
            peers[alike, step] = len(alike) - 1
    return Compared(ratio, excess_s, peers.max(axis=1, initial=0))


def _median_of_others(values: np.ndarray) -> np.ndarray:
    """For every value the median of the others; of many values that of all."""
    size = len(values)
    if size > _EXACT:
        return np.full(size, np.median(values))
    others = np.broadcast_to(values, (size, size))[~np.eye(size, dtype=bool)].reshape(size, size - 1)
    found: np.ndarray = np.median(others, axis=1)
    return found


def _planned(joined: Joined, survey: Survey, context: Context) -> np.ndarray | None:
    if not context.work_s:
        return None
    index_of = {trace.rank: index for index, trace in enumerate(joined.traces)}
    planned = np.zeros((len(joined.traces), survey.num_steps))
    for (rank, step), work in context.work_s.items():
        if rank in index_of and 0 <= step - survey.first_step < survey.num_steps:
            planned[index_of[rank], step - survey.first_step] = work
    return planned
