"""Numbers of the job for Prometheus, and where its agents serve theirs."""

import asyncio
from collections.abc import Iterator

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric

from evermesh.launcher.controller.controller import Controller
from evermesh.launcher.controller.reporting import job_status
from evermesh.launcher.controller.status import JobStatus
from evermesh.launcher.controller.targets import Target, targets_of
from evermesh.launcher.metrics.job import job_families
from evermesh.launcher.metrics.serving import rendered
from evermesh.launcher.metrics.totals import Totals
from evermesh.runtime.telemetry import StepReport


class _Moment:
    """A collector of what was told at one moment."""

    def __init__(self, status: JobStatus, report: StepReport | None, totals: Totals) -> None:
        self._told = status, report, totals

    def collect(self) -> Iterator[Metric]:
        """All families."""
        return job_families(*self._told)


def metrics_router(controller: Controller) -> APIRouter:
    """``/api/metrics`` in the text format of Prometheus, ``/api/metrics/targets`` for its discovery over HTTP."""
    router = APIRouter(prefix="/api/metrics")
    totals, one_at_a_time = Totals(controller.run), asyncio.Lock()

    def text_of(status: JobStatus, report: StepReport | None) -> bytes:
        totals.read_on()
        return rendered(_Moment(status, report, totals))

    @router.get("", response_class=PlainTextResponse)
    async def metrics() -> Response:
        async with one_at_a_time:  # files are read in another thread: the loop has leases to renew
            text = await asyncio.to_thread(text_of, job_status(controller), controller.job.last_report)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @router.get("/targets")
    async def targets() -> list[Target]:
        return targets_of(controller)

    return router
