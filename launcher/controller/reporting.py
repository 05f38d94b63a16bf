"""The status of a job, from what its controller knows."""

import os
import time
from typing import TYPE_CHECKING, Literal

from evermesh.launcher.controller.nodes import node_status
from evermesh.launcher.controller.remembering import snapshot_status
from evermesh.launcher.controller.status import JobStatus, RankStatus, SnapshotStatus
from evermesh.launcher.controller.work import newest_step

if TYPE_CHECKING:
    from evermesh.launcher.controller.controller import Controller
    from evermesh.launcher.controller.life import Life


def job_status(controller: "Controller") -> JobStatus:
    """What is told about the job now."""
    config, record, report = controller.config, controller.record, controller.job.last_report
    life = controller.life
    members = life.nodes if life else ()
    return JobStatus(
        name=controller.run.name,
        directory=str(controller.run.directory.absolute()),
        state=record.state,
        reason=record.reason,
        generation=record.generation,
        restarts=len(record.history)
        if record.state not in ("recovering", "failed")
        else max(0, len(record.history) - 1),
        max_restarts=config.restarts,
        workers=life.world_size if life else config.workers,
        nodes=tuple(
            node_status(
                node,
                life.ranks_of(node.name) if life else (),
                bool(members) and node.name not in members,
                controller.job.aside.get(node.name),
                controller.job.settings.get(node.name, ()),
            )
            for node in controller.nodes
        ),
        ranks=tuple(_rank_status(life, rank, node) for node in members for rank in life.ranks_of(node)) if life else (),
        step=report.step if report else None,
        steps=config.train.steps,
        loss=report.loss if report else None,
        tokens_per_s=report.tokens_per_s if report else None,
        time_left_s=report.time_left_s if report else None,
        lost_rack=controller.job.lost_rack,
        snapshot=_snapshot_status(controller),
        findings=controller.watch.findings,
        delays=controller.watch.delays,
        started_s=record.started_s,
        pid=os.getpid(),
    )


def _snapshot_status(controller: "Controller") -> SnapshotStatus | None:
    report = controller.job.last_report
    if report is None:
        return None
    since_s, is_on = time.monotonic() - controller.job.reported_s, controller.config.train.snapshot is not None
    newest, protection = newest_step(controller.run), controller.protection
    return snapshot_status(report, since_s, newest, is_on=is_on, protection=protection)


def _rank_status(life: "Life", rank: int, node: str) -> RankStatus:
    beat = life.beats.get(rank)
    has_stepped = beat is not None and beat.step > 0
    state: Literal["starting", "training", "done", "failed", "ended"] = "training" if has_stepped else "starting"
    if rank in life.done:
        state = "done"
    elif rank in life.failures:
        state = "failed"
    elif node in life.over or node in life.lost:
        state = "ended"
    return RankStatus(
        rank=rank,
        node=node,
        pid=life.pids.get(rank),
        state=state,
        step=beat.step if beat and has_stepped else None,
        step_s=beat.step_s if beat and has_stepped else None,
        compute_s=beat.compute_s if beat and has_stepped else None,
    )
