"""What is noted and told of an attempt that has failed."""

from pydantic import JsonValue

from evermesh.launcher.controller.in_memory import newest_of, remembered_step
from evermesh.launcher.controller.job import Job
from evermesh.launcher.controller.life import Life
from evermesh.launcher.controller.machine import decide
from evermesh.launcher.controller.stacks import stacks_of, told_stacks
from evermesh.launcher.controller.telling import explain, going_on
from evermesh.launcher.controller.work import last_step, newest_step
from evermesh.launcher.policy import root_cause


def count_failed(job: Job) -> None:
    """Once the ranks of a failed attempt are gone (until then it may still save), add it to the history, and tell from where
    the job goes on, if it does, and what frozen ranks were doing."""
    life = job.life
    if life is None or job.state != "recovering" or life.is_counted:
        return
    states, gone = job.nodes.states(), life.over | life.lost
    if any(node not in gone and states[node] == "ready" for node in life.nodes):
        return
    remembered = remembered_step(job.nodes, life.nodes, job.config, job.record.started_s)
    newest = newest_of(newest_step(job.run), remembered)
    failed = life.failed(job.record.reason, progressed=(newest or 0) > (life.began_at or 0))
    job.scribe.note("attempt failed", job.record.reason, **failed.model_dump(mode="json"))
    job.record.history.append(failed)
    life.is_counted = True
    _tell_going_on(job, life, newest, is_in_memory=remembered is not None and remembered == newest)
    if root_cause(failed.failures).cause == "froze":
        _tell_stacks(job, life)


def _tell_going_on(job: Job, life: Life, newest: int | None, *, is_in_memory: bool) -> None:
    decision = decide(job.view())
    if decision is None or decision.to not in ("starting", "waiting"):
        return
    told = explain(job.run, life, job.record.reason)
    text = going_on(told, newest, decision.reason, is_in_memory=is_in_memory)
    lost_steps = max(0, last_step(job.run) - (newest or 0))
    source = "memory" if is_in_memory else "storage"
    job.scribe.tell("restarted", text, step=newest or 0, source=source, lost_steps=lost_steps)


def _tell_stacks(job: Job, life: Life) -> None:
    doing = stacks_of(job.run, job.generation, life.world_size)
    frames: JsonValue = {str(rank): list(one.frames) for rank, one in doing.items()}
    waiting: JsonValue = [rank for rank, one in doing.items() if one.waits]
    job.scribe.tell("stacks", told_stacks(doing), doing=frames, waiting=waiting)
