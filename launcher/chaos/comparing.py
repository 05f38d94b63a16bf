"""A run with faults beside one without."""

from evermesh import checkpoint
from evermesh.launcher.chaos.report import Comparison, History
from evermesh.launcher.run_directory import Run

TOLERANCE = 1e-9
"""Relative: what another order of additions may cost in fp64."""


def compare(run: Run, clean: Run) -> Comparison:
    """Losses of all steps, and the parameters at the end."""
    ours, theirs = History.of(run), History.of(clean)
    pairs = list(zip(ours.reports, theirs.reports, strict=False))
    differing = [one.step for one, other in pairs if (one.step, one.loss) != (other.step, other.loss)]
    differences = [abs(one.loss - other.loss) / max(abs(one.loss), abs(other.loss), 1e-300) for one, other in pairs]
    is_whole = [report.step for report in ours.reports] == [report.step for report in theirs.reports]
    largest = max(differences, default=0.0)
    same_parameters = ours.parameters is not None and ours.parameters == theirs.parameters
    found = Comparison(
        clean=str(clean.directory),
        verdict="different",
        differing_step=differing[0] if differing else None,
        largest_difference=largest,
        parameters=theirs.parameters,
        slowdown=ours.wall_s / theirs.wall_s if theirs.wall_s > 0 else 0.0,
    )
    if is_whole and not differing and same_parameters:
        return found.model_copy(update={"verdict": "bit-equal"})
    if is_whole and largest <= TOLERANCE and (same_parameters or _are_close(run, clean)):
        return found.model_copy(update={"verdict": "within 1e-9"})
    return found


def _are_close(run: Run, clean: Run) -> bool:
    """Whether the newest checkpoints hold the same numbers, up to ``TOLERANCE``."""
    from evermesh.checkpoint.comparing import diff

    newest = [checkpoint.latest(one.checkpoints) for one in (run, clean)]
    if any(path is None for path in newest):
        return False
    found = diff(*(checkpoint.open_checkpoint(path) for path in newest if path is not None), tolerance=TOLERANCE)
    return not (found.missing or found.extra or found.other_kind or found.differing)
