"""From what the rings held to findings: all detectors, one after another."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evermesh.fault.detectors import kinds
from evermesh.fault.detectors.clocks import estimate_offsets
from evermesh.fault.detectors.communicating import find_slow_groups, find_slow_messages
from evermesh.fault.detectors.context import Context, is_noisy
from evermesh.fault.detectors.deaths import find_deaths
from evermesh.fault.detectors.disagreeing import find_disagreements, spoiled_by
from evermesh.fault.detectors.hanging import find_hangs, patient
from evermesh.fault.detectors.joining import Joined, Survey, join, survey
from evermesh.fault.detectors.lateness import find_late
from evermesh.fault.detectors.matching import Matched, match
from evermesh.fault.detectors.message_delays import edges_of
from evermesh.fault.detectors.reordering import find_reordered
from evermesh.fault.detectors.sentences import is_gone
from evermesh.fault.detectors.slow_jobs import find_slow_job
from evermesh.fault.detectors.slowing import exonerated, find_slow
from evermesh.fault.detectors.standing import standing_of
from evermesh.fault.events import Finding
from evermesh.fault.recorder.trace import RankTrace


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was concluded."""

    findings: tuple[Finding, ...]
    """The surest first."""
    exonerated: tuple[str, ...]
    """What looks like a fault of a rank and is none, in sentences."""
    num_ranks: int
    num_records: int


def diagnose(traces: Sequence[RankTrace], context: Context | None = None) -> Diagnosis:
    """Findings about a job, from the records of its ranks. A pure function; of some ranks only, it says what these show."""
    context = context or Context()
    joined = join(traces)
    surveyed = survey(joined)
    context, matched = _aligned(joined, surveyed, context)
    wrong = find_disagreements(joined, surveyed, matched)
    standing = standing_of(joined, surveyed, context)
    hanging = find_deaths(joined, standing, context) or find_hangs(joined, standing, context, spoiled_by(matched))
    found = [*wrong, *(one for one in hanging if not _is_said(one, wrong, context))]
    slow = find_slow(joined, surveyed, context)
    slow += find_late(joined, surveyed, matched, context, {one.rank for one in slow})
    if not is_noisy(context):  # else what takes long in a transfer may be a process that waits for a processor
        slow += find_slow_groups(joined, matched) + find_slow_messages(joined, edges_of(joined, context.offsets))
    found += [*slow, *find_reordered(joined, surveyed)]
    if not slow:
        found += find_slow_job(surveyed, matched, context)
    return Diagnosis(
        tuple(sorted(found, key=lambda one: -one.confidence)),
        (*exonerated(joined, surveyed, context), *patient(joined, standing, context)),
        len(joined.traces),
        sum(len(trace.records) for trace in joined.traces),
    )


def _aligned(joined: Joined, surveyed: Survey, context: Context) -> tuple[Context, Matched]:
    """The collectives in one clock, and what was found of the clocks if nobody had told."""
    nodes = {trace.node for trace in joined.traces}
    known = dict(context.offsets)
    matched = match(joined, surveyed.of_slot, {node: known[node].offset_ns for node in nodes if node in known})
    if len(nodes) < 2 or known:
        return context, matched
    context = replace(context, offsets=estimate_offsets(joined, matched))
    matched.move({node: offset.offset_ns for node, offset in context.offsets.items()}, joined)
    return context, matched


def _is_said(hang: Finding, wrong: Sequence[Finding], context: Context) -> bool:
    """Whether a wait is what follows from a disagreement that is a finding already."""
    if hang.kind in (kinds.DEADLOCK, kinds.SKIPPED, kinds.EXTRA) or (
        hang.rank is not None and is_gone(context, hang.rank)
    ):
        return any(one.rank is not None for one in wrong)
    return hang.kind == kinds.COMMUNICATION_HANG and any(one.group == hang.group for one in wrong)
