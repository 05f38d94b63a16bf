"""In which layout a job goes on with fewer nodes: the fastest of those that it can have, ranked while it trains."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO, NamedTuple

from pydantic import ValidationError

from evermesh.launcher.controller.job import Job
from evermesh.launcher.controller.life import Life
from evermesh.launcher.controller.work import layout_of_newest
from evermesh.launcher.elastic import layouts_on
from evermesh.launcher.ranking import Expected, Rankings, may_choose
from evermesh.parallelism.layout import Layout

_MODULE = "evermesh.launcher.ranking"


class Choice(NamedTuple):
    """A layout, and what people are told about it."""

    layout: Layout
    told: str = ""
    """Empty: there was nothing to choose from."""


class LayoutChoice:
    """Chooses for ``job``. What takes time is done by a process of its own, so that no recovery waits for it."""

    def __init__(self, job: Job) -> None:
        self._job, self._run, self._config = job, job.run, job.config
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._known: Rankings | None = None

    def look(self) -> None:
        """Called now and then: once the job trains, have all choices ranked, if there are any, and tell when they are."""
        if self._process is not None:
            self._take()
        elif self._known is None and self._job.state == "training" and may_choose(self._config):
            self._begin()

    def _begin(self) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - it may be more than a pipe holds
        with (self._run.logs / "ranking.log").open("ab") as log:
            command = [sys.executable, "-P", "-m", _MODULE, str(self._run.directory.absolute())]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=log, start_new_session=True
            )

    def of(self, life: Life) -> Layout:
        """The layout of an attempt: that of what ranks go on from, and another one with fewer nodes than that had, or more.
        What it was chosen from is told."""
        job = self._job
        before = layout_of_newest(job.run, job.config.train.layout, job.record.started_s, life.remembered)
        choice = None if before.world_size == life.world_size else self.on(life.world_size)
        if choice is not None and choice.told:
            job.scribe.tell("layout chosen", choice.told, layout=choice.layout.model_dump(mode="json"))
        return choice.layout if choice is not None else before

    def on(self, workers: int) -> Choice | None:
        """The layout on so many workers; None: the job can have none."""
        layouts = layouts_on(self._config, workers)
        if len(layouts) < 2:
            return Choice(layouts[0]) if layouts else None
        self._take()
        known = self._known or Rankings(problem="that was not done yet")
        ranking = next((one for one in known.rankings if one.workers == workers), None)
        fastest = [one for one in (ranking.fastest if ranking else ()) if one.layout in layouts]
        if ranking is None or not fastest:
            why = known.problem or "by formula none of them fits into memory"
            first = f"{workers} workers go on as {_degrees(layouts[0])}, the first of {len(layouts)} layouts"
            return Choice(layouts[0], f"{first}, for they are not ranked: {why}")
        return Choice(fastest[0].layout, _told(workers, fastest, ranking.seconds))

    def _take(self) -> None:
        """What the process has found, if it is over by now."""
        if self._process is None or self._process.poll() is None:
            return
        self._known, self._process = self._read(self._process.returncode), None
        numbers = [f"{one.workers} workers: {len(one.fastest)} in {one.seconds:.2g} s" for one in self._known.rankings]
        text = f"layouts for fewer nodes: {'; '.join(numbers) or self._known.problem or 'there is no choice'}"
        self._job.scribe.tell("layouts ranked", text)

    def _read(self, code: int) -> Rankings:
        assert self._output is not None
        with self._output as output:
            output.seek(0)
            try:
                return Rankings.model_validate_json(output.read())
            except ValidationError:
                log = self._run.logs / "ranking.log"
                return Rankings(problem=f"ranking them ended with {code} (its log: {log})")


def _told(workers: int, fastest: Sequence[Expected], seconds: float) -> str:
    best, *others = fastest
    text = f"{workers} workers go on as {_degrees(best.layout)}, where a step should take {best.step_s:.3g} s"
    for second in others[:1]:
        longer = second.step_s / best.step_s - 1.0
        text += f"; {_degrees(second.layout)} would take {second.step_s:.3g} s, {longer:.0%} longer"
    return f"{text} ({len(fastest)} layouts ranked in {seconds:.2g} s)"


def _degrees(layout: Layout) -> str:
    return f"pp {layout.pp} x hdp {layout.hdp} x tp {layout.tp}"
