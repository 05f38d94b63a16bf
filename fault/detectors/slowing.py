"""Ranks that compute longer than others that do the same: always, in some steps, or more and more.

A rank is blamed only if its own computation is longer, at equal stage, sizes and planned work, in most of the recent
steps, by far more than its peers differ among each other. What all ranks of a stage have in common, what differs from
step to step, and what the plan explains blames nobody.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from evermesh.fault.detectors import kernels, kinds
from evermesh.fault.detectors.comparing import Compared, compare, stages_of
from evermesh.fault.detectors.context import Context, is_noisy
from evermesh.fault.detectors.growing import gradual, growing
from evermesh.fault.detectors.joining import Joined, Survey
from evermesh.fault.detectors.pausing import LEAST_SHARE, Slow, pausing
from evermesh.fault.detectors.spreads import COMMON, FEW, LEAST_RATIO, LEAST_SCORE, SPREAD_FLOOR, noise, spread
from evermesh.fault.detectors.standing import median_step_s
from evermesh.fault.events import Finding
from evermesh.fault.recorder.trace import UNKNOWN_NODE

LEAST_STEPS = 6
_RECENT, _MANY = 8, 32
"""Steps in which a rank has to be slow: few show it soon, many where times vary."""
_LEAST_SCORE_OF_FEW = 8.0
_LASTING = 0.75
_SAMPLED = 64
"""Ranks that show how much steps differ by chance."""


def find_slow(joined: Joined, survey: Survey, context: Context) -> list[Finding]:
    """Slow ranks and gradual slowdowns."""
    train = compare(joined, survey, context, kernels.TRAIN_NS)
    slower = growing(train)
    slow = [one for one in _lasting(survey, train, "computes") if one.trace not in slower]
    of_input = compare(joined, survey, context, kernels.INPUT_NS)
    slow += [one for one in _lasting(survey, of_input, "input") if one.share >= 2 * LEAST_SHARE]
    told = {one.trace for one in slow} | set(slower)
    slow += [one for one in pausing(survey, train, is_noisy=is_noisy(context)) if one.trace not in told]
    slow = [one for one in slow if not _is_starved(joined, context, one)]
    return [
        *(gradual(joined, survey, trace, train, growth) for trace, growth in slower.items()),
        *_by_node(joined, slow),
    ]


def _lasting(survey: Survey, compared: Compared, cause: str) -> list[Slow]:
    """Ranks that are slower in most of the recent steps, of few or of many."""
    return _slower(survey, compared, cause, _RECENT) or _slower(survey, compared, cause, _MANY)


def _slower(survey: Survey, compared: Compared, cause: str, steps: int) -> list[Slow]:
    """Ranks that are slower in most of the last ``steps``."""
    recent = _recent(compared.ratio, steps)
    count = (~np.isnan(recent)).sum(axis=1)
    usable = count >= max(LEAST_STEPS, steps * _LASTING)
    step_s = median_step_s(survey)
    if not usable.any() or step_s <= 0:
        return []
    logs = np.full(len(recent), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs[usable] = np.nanmedian(np.log(np.maximum(recent[usable], 1e-6)), axis=1)
    excess = np.full(len(recent), np.nan)
    excess[usable] = np.nanmedian(_recent(compared.excess_s, steps)[usable], axis=1)
    of_peers = spread(logs[usable])
    sample = recent[usable][:: max(1, int(usable.sum()) // _SAMPLED)]
    usual_noise = float(np.median([noise(_logs(row)) for row in sample]))
    found = []
    for trace in np.flatnonzero(usable & (logs > np.log(LEAST_RATIO)) & (excess > LEAST_SHARE * step_s)).tolist():
        own = _logs(recent[trace])
        is_few = compared.peers[trace] < FEW
        own_noise = max(noise(own), usual_noise, float(np.diff(own).std()) / np.sqrt(2) if is_few else 0.0)
        of_steps = max(own_noise / np.sqrt(len(own)), SPREAD_FLOOR / 2)
        score = float(logs[trace] / (of_steps if is_few else max(of_steps, of_peers)))
        lasting = float((own > logs[trace] / 2).mean())
        if score < (_LEAST_SCORE_OF_FEW if is_few else LEAST_SCORE) or lasting < _LASTING:
            continue
        share = float(excess[trace]) / step_s
        found.append(
            Slow(
                trace,
                cause,
                float(np.exp(logs[trace])),
                float(excess[trace]),
                share,
                share,
                score,
                _since(survey, compared.ratio[trace], float(logs[trace])),
                int(compared.peers[trace]),
            )
        )
    return found if len(found) <= max(1, COMMON * usable.sum()) else []


def _is_starved(joined: Joined, context: Context, one: Slow) -> bool:
    """Whether other processes explain it: the rank waits for a processor, and longer than others if there are enough."""
    shares = [context.starved.get(trace.rank, 0.0) for trace in joined.traces]
    others = float(np.median([share for trace, share in enumerate(shares) if trace != one.trace] or [0.0]))
    return shares[one.trace] - (others if one.peers >= FEW else 0.0) > one.mean_share / 2


def _logs(ratios: np.ndarray) -> np.ndarray:
    """Logarithms of those that are known."""
    found: np.ndarray = np.log(np.maximum(ratios[~np.isnan(ratios)], 1e-6))
    return found


def _recent(table: np.ndarray, steps: int) -> np.ndarray:
    """The newest ``steps`` known values of every row, in order, not a number where there are fewer."""
    known = ~np.isnan(table)
    behind = np.cumsum(known[:, ::-1], axis=1)[:, ::-1]  # known values from here on
    found = np.full((len(table), steps), np.nan)
    rows, columns = np.nonzero(known & (behind <= steps))
    places = np.minimum(known.sum(axis=1), steps)[rows] - behind[rows, columns]
    found[rows, places] = table[rows, columns]
    return found


def _since(survey: Survey, ratios: np.ndarray, level: float) -> int:
    """The first step of those, up to the last, in which the rank was slow."""
    with np.errstate(invalid="ignore"):
        fast = np.flatnonzero(np.log(np.maximum(ratios, 1e-6)) <= level / 2)
    known = np.flatnonzero(~np.isnan(ratios))
    behind = known[known > fast[-1]] if len(fast) else known
    if len(behind) < LEAST_STEPS // 2:  # one quick step in between is no recovery
        behind = known
    return survey.first_step + int(behind[0])


def _by_node(joined: Joined, slow: Sequence[Slow]) -> Iterator[Finding]:
    """One finding for a rank, or for a node all of whose ranks are slow in the same way."""
    of_node: dict[str, set[int]] = defaultdict(set)
    for index, trace in enumerate(joined.traces):
        of_node[trace.node].add(index)
    by_node: dict[tuple[str, str], list[Slow]] = defaultdict(list)
    for one in slow:
        by_node[joined.traces[one.trace].node, one.cause].append(one)
    of_node.pop(UNKNOWN_NODE, None)
    for (node, _), found in by_node.items():
        if len(of_node) > 1 and len(found) > 1 and {one.trace for one in found} == of_node.get(node):
            yield _finding(
                joined, max(found, key=lambda one: one.score), f"all {len(found)} ranks of node {node}", None
            )
        else:
            for one in found:
                yield _finding(joined, one, joined.where(one.trace), joined.traces[one.trace].rank)


_DOES = {
    "computes": "computed {ratio:.2f} times as long",
    "input": "waited {excess_ms:.1f} ms longer for input in every step",
    "pauses": "pauses for {excess_ms:.0f} ms now and then, as for a garbage collection,",
}


def _finding(joined: Joined, one: Slow, who: str, rank: int | None) -> Finding:
    does = _DOES[one.cause].format(ratio=one.ratio, excess_ms=one.excess_s * 1e3)
    if rank is None:
        does = does.replace("computed", "compute").replace("waited", "wait").replace("pauses", "pause")
    peers = "rank that does" if one.peers == 1 else "ranks that do"
    return Finding(
        kind=kinds.SLOW_RANK,
        rank=rank,
        node=joined.node(one.trace),
        step=one.since,
        text=f"{who} {does} since step {one.since} or before, {one.share:.0%} of the step, "
        f"next to {one.peers} {peers} the same",
        evidence={
            "cause": one.cause,
            "ratio": round(one.ratio, 3),
            "excess_s": round(one.excess_s, 6),
            "share_of_step": round(one.share, 3),
            "score": round(one.score, 1),
            "peers": one.peers,
        },
        confidence={"pauses": 0.6}.get(one.cause, 0.9 if one.peers >= FEW else 0.75),
    )


def exonerated(joined: Joined, survey: Survey, context: Context) -> list[str]:
    """What looks like a slow rank and is not one, in sentences."""
    bare = Context(patience_s=context.patience_s)
    notes = []
    if context.work_s:
        raw, planned = (
            compare(joined, survey, bare, kernels.TRAIN_NS),
            compare(joined, survey, context, kernels.TRAIN_NS),
        )
        notes += [
            f"{joined.where(one.trace)} computed {one.ratio:.2f} times as long as its peers: the plan gave it that much more"
            for one in _lasting(survey, raw, "computes")
            if np.nanmedian(planned.ratio[one.trace]) < 1 + (one.ratio - 1) / 2
        ]
    stages = stages_of(joined)
    whole = survey.is_whole()
    times = {
        stage: float(np.median(survey.of_step[stages == stage][:, :, kernels.TRAIN_NS][whole[stages == stage]]))
        for stage in np.unique(stages).tolist()
        if whole[stages == stage].any()
    }
    if len(times) > 1:
        usual = float(np.median(list(times.values())))
        notes += [
            f"pipeline stage {stage} computes {time / usual:.2f} times as long as the median stage: its ranks all do, so it "
            "is how the layers are divided"
            for stage, time in times.items()
            if usual > 0 and time / usual > LEAST_RATIO
        ]
    return notes
