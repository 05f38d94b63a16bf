"""What the controller tells people about failures and what follows from them."""

import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from evermesh.launcher.policy import root_cause
from evermesh.launcher.run_directory import Run

if TYPE_CHECKING:
    from evermesh.fault.cluster.records import Cordon
    from evermesh.launcher.config import JobConfig
    from evermesh.launcher.controller.life import Life
    from evermesh.launcher.controller.record import Record


def explain(run: Run, life: "Life", reason: str) -> str:
    """Which rank failed and how, what it said last, and where to look."""
    if life.lost or not life.failures:
        return f"{reason}.\nLogs: {run.logs}"
    failures = tuple(life.failures.values())
    first = root_cause(failures)
    lines = [f"worker {first.rank} {first.how}."]
    if first.code == -signal.SIGKILL:
        lines.append("If memory ran out (dmesg tells), lower train.layout.capacity or the number of workers.")
    if first.text and not first.has_traceback:
        lines += [f"  | {line}" for line in first.text.splitlines()]
    silent = [] if not first.peer_lost else [rank for rank in life.pids if rank not in life.failures | life.done]
    if silent:
        lines.append(f"Not a word came from rank {', '.join(map(str, silent))}: stopped, or hanging.")
    others = f" What the others were doing: {run.logs}/rank-*.stacks" if len(life.pids) > 1 else ""
    lines.append(f"Its log: {run.logs / f'rank-{first.rank}.log'}{others}")
    return "\n".join(lines)


def going_on(text: str, step: int | None, reason: str, *, is_in_memory: bool = False) -> str:
    """The first line of ``text``, and from where the next attempt goes on."""
    place = f"step {step}" if step is not None else "the beginning, there is no checkpoint yet"
    place += ", which is in memory," if is_in_memory else ""
    return f"{text.splitlines()[0]} Going on from {place} ({reason})."


def told_cordon(name: str, cordon: "Cordon") -> str:
    """Which node is cordoned, by whom, why, and until when."""
    until = (
        f", until {datetime.fromtimestamp(cordon.until_s, UTC):%Y-%m-%d %H:%M} UTC"
        if cordon.until_s is not None
        else ""
    )
    return f"{name} ({cordon.node}) is cordoned by {cordon.by}: {cordon.because}{until}"


def last_words(
    run: Run, config: "JobConfig", record: "Record", life: "Life | None", reason: str
) -> tuple[str, str | None]:
    """Why a job has failed, and the traceback of the rank that failed first, if it is its own."""
    if life is None or not record.history:
        return reason, None
    first = root_cause(record.history[-1].failures)
    if record.state == "waiting":  # no attempt was wrong: nodes are missing
        return f"rank {first.rank} {first.how.splitlines()[0]}. {reason}", None
    text = explain(run, life, record.reason)
    if len(record.history) > 1 or config.restarts:
        text += f"\nNo other attempt: {reason}."
    return text, first.text if first.has_traceback and not first.peer_lost else None


def told_early_end(run: Run, node: str) -> str:
    """That an agent ended before it joined, with its last words."""
    log = run.logs / f"agent-{node}.log"
    lines = [line.strip() for line in (log.read_text(errors="replace") if log.is_file() else "").split("\n")]
    said = [line for line in lines if line] or ["without a word"]
    own = [line for line in said if not line.startswith("srun:")]  # which says last that a task has ended
    return f"{node} ended before it joined: {(own or said)[-1]} Its log: {log}"


def told_stop(number: int, at_once: bool) -> str:
    """A request to stop, in words."""
    how = "at once" if at_once else "after a checkpoint"
    return f"asked to stop {how} ({signal.Signals(number).name})"
