"""What became of a run with faults, from what it wrote down: its journal, its events and its telemetry."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from evermesh.fault.events import Event, read_events
from evermesh.fault.injection import Cut, Delay, Fill, Flip, Injection, Kill, Poison, Shot, Slow, Stop
from evermesh.fault.injection.telling import INJECTED
from evermesh.launcher.controller.journal import Entry, read_journal
from evermesh.launcher.run_directory import Run
from evermesh.runtime.telemetry import StepReport, read_telemetry

Outcome = Literal["restarted", "survived", "ended the job", "not injected"]
_HARMLESS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGCONT", "SIGUSR1", "SIGCHLD", "SIGURG", "SIGWINCH")
"""Signals that end no rank and no agent."""
_NOTICED = ("node cut off", "node lost")
_NOTICED_AFTER_S = 2.0
"""Seconds for which a way may be whole again when its node is told as cut off."""

_CONCLUDED_WITHIN_S = 0.5
"""Of the end of an attempt: what was concluded of it may be written down a moment later."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class FaultReport(_Frozen):
    """One shot and what followed. Seconds are counted from it."""

    fault: str
    """What, whom, where."""
    injected: str | None = None
    """As it was written down; None: it never was."""
    step: int | None = None
    """The step under way; of what is no rank, the last one finished."""
    found_after_s: float | None = None
    """Until the detectors had concluded what is wrong from the records of collectives; None: they said nothing."""
    finding: str | None = None
    """Their sentence."""
    detected_after_s: float | None = None
    """Until the controller, or another one, answered it; None: nobody had to."""
    cause: str | None = None
    """As the controller named it."""
    training_after_s: float | None = None
    """Until the next attempt had finished a step."""
    steps_lost: int = 0
    """Steps that were trained again."""
    outcome: Outcome = "not injected"


class Comparison(_Frozen):
    """The run beside one without faults."""

    clean: str
    """Directory of that."""
    verdict: Literal["bit-equal", "within 1e-9", "different"]
    differing_step: int | None = None
    """The first one whose loss differs."""
    largest_difference: float = 0.0
    """Of the losses, relative."""
    parameters: str | None = None
    """Digest, of the clean run."""
    slowdown: float
    """Wall time of the run over that of the clean one, from the first step on."""


class ChaosReport(_Frozen):
    """A run with faults as a whole."""

    run: str
    passed: bool
    problems: tuple[str, ...]
    """Why it has not passed."""
    exit_code: int
    expected_exit: int
    faults: tuple[FaultReport, ...]
    attempts: int
    steps: int
    steps_lost: int
    """Trained, and trained again."""
    wall_s: float
    """From the end of the first step to the end of the job."""
    goodput: float
    """Seconds of the steps that count, over all of that time."""
    orphans: tuple[str, ...]
    leaked_memory: tuple[str, ...]
    parameters: str | None
    """Digest, at the end."""
    comparison: Comparison | None = None


@dataclass(frozen=True, slots=True)
class History:
    """All that is known of a run that has ended."""

    journal: Sequence[Entry]
    events: Sequence[Event]
    reports: Sequence[StepReport]
    """Of the steps that count."""
    steps_trained: int
    """With those that were lost."""
    controllers: Sequence[tuple[float, int]] = ()
    """Wall clock and process of every controller."""

    @classmethod
    def of(cls, run: Run, controllers: Sequence[tuple[float, int]] = ()) -> "History":
        """What the directory of ``run`` tells."""
        has_steps = run.telemetry.is_file()
        reports = read_telemetry(run.telemetry) if has_steps else []
        steps_trained = run.telemetry.read_bytes().count(b"\n") if has_steps else 0
        events = list(read_events(run.events)) if run.events.is_file() else []
        return cls(list(read_journal(run.journal)), events, reports, steps_trained, controllers)

    @property
    def parameters(self) -> str | None:
        """Digest of the parameters at the end."""
        ends = [event for event in self.events if event.kind in ("finished", "stopped")]
        found = [event.fields["parameters"] for event in ends if "parameters" in event.fields]
        return str(found[-1]) if found else None

    @property
    def attempts(self) -> int:
        return sum(entry.kind == "attempt" for entry in self.journal)

    @property
    def wall_s(self) -> float:
        """From the end of the first step to the end of the job."""
        first = self.next_to("training")
        return self.journal[-1].time_s - first.time_s if first is not None else 0.0

    @property
    def goodput(self) -> float:
        """Seconds of the steps that count, but for the first, over all of that time."""
        good_s = sum(report.step_s for report in self.reports[1:])
        return min(1.0, good_s / self.wall_s) if self.wall_s > 0 else 0.0

    def generation_at(self, time_s: float) -> int:
        """The attempt under way."""
        begun = [entry.generation for entry in self.journal if entry.kind == "attempt" and entry.time_s <= time_s]
        return begun[-1] if begun else 0

    def next_to(self, state: str, time_s: float = 0.0, generation: int = 0) -> Entry | None:
        """The first transition to ``state`` from then on, of this attempt or a later one."""
        for entry in self.journal:
            is_it = entry.kind == "transition" and entry.fields["to"] == state
            if is_it and entry.time_s >= time_s and entry.generation >= generation:
                return entry
        return None

    def first_finding(self, from_s: float, to_s: float) -> Event | None:
        """What the detectors concluded first between two moments."""
        told = (event for event in self.events if event.kind == "finding" and from_s <= event.time_s <= to_s)
        return next(told, None)

    def steps_lost(self, generation: int) -> int:
        """Steps of an attempt that failed after its newest checkpoint."""
        last = next((event.step for event in self.events if event.fields.get("attempt") == generation), None)
        begins = [entry for entry in self.journal if entry.kind == "attempt" and entry.generation == generation + 1]
        if last is None or not begins:
            return 0
        return max(0, last - int(str(begins[0].fields["began_at"] or 0)))


def fault_reports(injection: Injection, history: History) -> tuple[FaultReport, ...]:
    """What became of every shot."""
    fired = {int(str(event.fields["shot"])): event for event in history.events if event.kind == INJECTED}
    return tuple(_report(shot, fired, injection, history) for shot in injection.shots)


def _report(shot: Shot, fired: dict[int, Event], injection: Injection, history: History) -> FaultReport:
    event = fired.get(shot.number)
    if event is None:
        return FaultReport(fault=str(shot))
    told = FaultReport(fault=str(shot), injected=event.text, step=event.step, outcome="survived")
    generation = history.generation_at(event.time_s)
    end = history.next_to("recovering", event.time_s, generation)
    finding = history.first_finding(event.time_s, end.time_s + _CONCLUDED_WITHIN_S if end else math.inf)
    if finding is not None:
        found = {"found_after_s": finding.time_s - event.time_s, "finding": finding.text}
        told = told.model_copy(update=found)
    if (
        end is not None
        and end.generation == generation
        and _is_to_blame(shot, generation, end, fired, injection, history)
    ):
        again = history.next_to("training", end.time_s, generation + 1)
        return told.model_copy(
            update={
                "detected_after_s": end.time_s - event.time_s,
                "cause": end.reason,
                "training_after_s": again.time_s - event.time_s if again else None,
                "steps_lost": history.steps_lost(generation),
                "outcome": "restarted" if again else "ended the job",
            }
        )
    noticed = _noticed(shot, event, history)
    if noticed is None:
        return told
    time_s, cause = noticed
    is_end = shot.victim is not None and shot.victim.of == "launcher"
    outcome: Outcome = "ended the job" if is_end else "survived"
    return told.model_copy(update={"detected_after_s": time_s - event.time_s, "cause": cause, "outcome": outcome})


def _is_to_blame(
    shot: Shot, generation: int, end: Entry, fired: dict[int, Event], injection: Injection, history: History
) -> bool:
    """Whether an attempt ended because of ``shot``: what must end one is to blame before what need not."""
    ending = [
        other
        for other in injection.shots
        if _must_end(other)
        and other.number in fired
        and fired[other.number].time_s <= end.time_s
        and history.generation_at(fired[other.number].time_s) == generation
    ]
    return not ending or shot in ending


def _must_end(shot: Shot) -> bool:
    """Whether no attempt goes on behind it."""
    fault, of = shot.fault, shot.victim.of if shot.victim is not None else None
    if isinstance(fault, Slow | Cut | Delay | Fill | Flip | Poison) or of in ("controller", "launcher", "keeper"):
        return False
    if isinstance(fault, Kill):
        return fault.signal not in _HARMLESS
    return not (isinstance(fault, Stop) and (fault.continue_after_s is not None or of == "agent"))


def _noticed(shot: Shot, event: Event, history: History) -> tuple[float, str] | None:
    """When and how it was noticed though the attempt went on."""
    of = shot.victim.of if shot.victim is not None else None
    if of == "controller":
        later = [
            (time_s, pid) for time_s, pid in history.controllers if time_s > event.time_s and pid != event.fields["pid"]
        ]
        return (later[0][0], f"another controller, process {later[0][1]}, took over") if later else None
    if of == "launcher":
        stops = [entry for entry in history.journal if entry.kind == "stop" and entry.time_s >= event.time_s]
        return (stops[0].time_s, stops[0].reason) if stops else None
    if of in ("agent", "node") and not isinstance(shot.fault, Slow):
        lasts_s = shot.fault.for_s + _NOTICED_AFTER_S if isinstance(shot.fault, Cut | Delay) else float("inf")
        told = [
            other for other in history.events if other.kind in _NOTICED and 0 <= other.time_s - event.time_s <= lasts_s
        ]
        return (told[0].time_s, told[0].text) if told else None
    if of == "keeper" or (isinstance(shot.fault, Flip) and shot.fault.is_of_snapshot):
        kind = "keeper lost" if of == "keeper" else "snapshot damaged"
        told = [other for other in history.events if other.kind == kind and other.time_s >= event.time_s]
        return (told[0].time_s, told[0].text) if told else None
    if shot.alters_numbers:
        skipped = [other for other in history.events if other.kind == "skipped" and other.step == event.step]
        return (skipped[0].time_s, skipped[0].text) if skipped else None
    return None
