"""What a restart would cost now: a pure function of the last report and of the newest checkpoint."""

from evermesh.launcher.controller.status import SnapshotStatus, Standing
from evermesh.runtime.telemetry import StepReport


def snapshot_status(
    report: StepReport, since_s: float, saved: int | None, *, is_on: bool, protection: Standing = "none"
) -> SnapshotStatus:
    """How it stands with snapshots, ``since_s`` seconds after ``report``.

    ``saved`` is the step of the newest checkpoint, None without one; ``is_on`` whether the run wants snapshots,
    ``protection`` whether other nodes can make those of a lost one again.
    """
    told = report.snapshot
    since_saved = max(0, report.step - (saved or 0))
    is_in_memory = told.step is not None and told.step >= (saved or 0)
    lost_steps = max(0, report.step - (told.step or 0)) if is_in_memory else since_saved
    return SnapshotStatus(
        is_on=is_on,
        step=told.step,
        age_steps=None if told.step is None else report.step - told.step,
        age_s=None if told.step is None else told.age_s + since_s,
        every=told.every,
        committed=told.committed,
        skipped=told.skipped,
        lost=told.lost,
        source="memory" if is_in_memory else "nothing" if saved is None else "storage",
        lost_steps=lost_steps,
        lost_s=lost_steps * report.step_s,
        lost_steps_of_node=lost_steps if protection == "protected" else since_saved,
        protection=protection,
    )
