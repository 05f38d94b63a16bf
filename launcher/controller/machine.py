"""The states of a job, and what leads from one to the next: pure functions of what the controller sees.

The picture is in the README of the launcher. ``decide`` is asked again after everything that happens, until it answers
None; the controller writes each answer into its journal before it carries it out.
"""

import math
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from evermesh.launcher.controller.status import JobState
from evermesh.launcher.policy import REQUEUE, FailedAttempt, Failure, Finish, after_failure, root_cause

SETTLE_S = 0.05
"""After a failure: how long another rank may still tell an earlier one."""
ROOT_CAUSE_WAIT_S = 2.5
"""After a rank lost its peer: how long the peer has to say, or show, why; longer than a lease, so that a lost node is
named."""
NodeState = Literal["joining", "ready", "refused", "cut off", "lost"]
"""``refused``: it is there, and not fit for a job."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Somebody wants the job to end."""

    signal: int
    at_once: bool
    """Without a checkpoint."""
    deadline_s: float | None
    """Monotonic clock: from then on at once; None for no limit."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """The current life of the workers, as far as it is known."""

    nodes: tuple[str, ...]
    world_size: int
    done: Mapping[int, Mapping[str, Any]]
    """By rank: what it returned."""
    failures: tuple[Failure, ...]
    failed_s: float | None
    """Monotonic clock of the controller at the first failure."""
    over: frozenset[str]
    """Nodes on which no process of it is left."""
    has_stepped: bool
    is_ending: bool
    """Its ranks have been told to end at once."""
    is_counted: bool
    """It is in the history."""
    lost: frozenset[str] = frozenset()
    """Nodes that were lost during it, even if another agent is there by now."""
    is_started: bool = True
    """Its ranks have been told to start."""

    @property
    def is_done(self) -> bool:
        return len(self.done) == self.world_size

    @property
    def has_regrouped(self) -> bool:
        """All ranks have left the state to those of another attempt."""
        return self.is_done and self.done[0].get("reason") == "regroup"


@dataclass(frozen=True, slots=True)
class JobView:
    """All that a decision depends on."""

    state: JobState
    since_s: float
    """Monotonic clock: when it came into this state."""
    now_s: float
    nodes: Mapping[str, NodeState]
    nodes_needed: int
    """On all of which the job runs if it can."""
    join_timeout_s: float
    max_restarts: int
    history: tuple[FailedAttempt, ...]
    """Failed attempts, oldest first."""
    attempt: Attempt | None
    stop: Stop | None
    requeue_on_term: bool = False
    refusal: str | None = None
    """Why no attempt can be started at all."""
    shortage: str = ""
    """Why nodes are missing, as their place tells it."""
    fewer_nodes: tuple[int, ...] = ()
    """Smaller numbers of nodes on which it can go on, most first."""
    shrink_after_s: float = 0.0
    """How long it waits for the others before it does."""
    grow_after_s: float | None = None
    """How long nodes must have been there until an attempt ends for them; None: it does not."""
    size_since_s: float = 0.0
    """Monotonic clock: since when an attempt could be as large as now."""
    aside: Mapping[str, str] = field(default_factory=dict)
    """Nodes that no other attempt is to use, and why."""
    suspected: Mapping[str, float] = field(default_factory=dict)
    """Nodes that may be used, and the probability that they are at fault."""
    leaving: frozenset[str] = frozenset()
    """Of these, those that an attempt which uses them is to leave, behind a step."""

    @property
    def usable(self) -> dict[str, NodeState]:
        """State of the nodes that attempts may have."""
        return {node: state for node, state in self.nodes.items() if node not in self.aside}

    @property
    def spares_first(self) -> dict[str, NodeState]:
        """The same in the order in which they take the places of others: first who nothing speaks against."""
        if self.attempt is None:
            return self.usable
        return dict(sorted(self.usable.items(), key=lambda node: self.suspected.get(node[0], 0.0)))


@dataclass(frozen=True, slots=True)
class Transition:
    """From the state of the view to another, or, with ``ends_ranks``, to the end of the ranks in the same one."""

    to: JobState
    reason: str
    exit_code: int | None = None
    """Of the final states."""
    ends_ranks: bool = False


def decide(view: JobView) -> Transition | None:
    """What follows from what is seen; None: wait."""
    if view.state in ("placing", "waiting"):
        return _place(view)
    if view.state in ("starting", "training", "regrouping"):
        return _train(view)
    if view.state == "stopping":
        return _stop(view)
    return _recover(view) if view.state == "recovering" else None


def exit_code(view: JobView) -> int:
    """What a job that somebody stopped ends with."""
    assert view.stop is not None
    return REQUEUE if view.stop.signal == signal.SIGTERM and view.requeue_on_term else 128 + view.stop.signal


def size_of_attempt(view: JobView) -> int | None:
    """The number of nodes that the next attempt may have, of those that are ready; None: too few."""
    ready = sum(state == "ready" for state in view.usable.values())
    return next((count for count in (view.nodes_needed, *view.fewer_nodes) if count <= ready), None)


def choose_nodes(nodes: Mapping[str, NodeState], needed: int, before: tuple[str, ...]) -> tuple[str, ...] | None:
    """The nodes of the next attempt in the order of their ranks; None if there are too few.

    A node that took part keeps its place, so that its ranks find what they left there; others take the free places. If
    there are fewer places than before, those that took part move up.
    """
    ready = [node for node, state in nodes.items() if state == "ready"]
    if len(before) > needed:
        before = tuple(node for node in before if node in ready)
    fresh = iter([node for node in ready if node not in before])
    places = [node if node in ready else next(fresh, None) for node in before[:needed]]
    places += [next(fresh, None) for _ in range(needed - len(places))]
    found = tuple(node for node in places if node is not None)
    return found if len(found) == needed else None


def _place(view: JobView) -> Transition | None:
    if view.stop is not None:
        return Transition("stopped", "stopped before it could start", exit_code(view))
    if view.refusal is not None:
        return Transition("failed", view.refusal, 1)
    if (reason := _too_few(view)) is not None:
        return Transition("failed", reason, REQUEUE)
    ready = sum(state == "ready" for state in view.usable.values())
    may_start = view.attempt is None or _is_over(view, view.attempt)
    if ready >= view.nodes_needed and may_start:
        return Transition("starting", f"{ready} of {view.nodes_needed} nodes are ready")
    patience_s = view.join_timeout_s if view.attempt is None else min(view.shrink_after_s, view.join_timeout_s)
    size = size_of_attempt(view)
    if size is not None and may_start and view.now_s - view.since_s > patience_s:
        missing = f"{ready} of {view.nodes_needed} nodes were there after {patience_s:g} s"
        return Transition("starting", f"{missing}; going on with {size}, with the same batches")
    if view.now_s - view.since_s > view.join_timeout_s:
        reason = (
            f"{ready} of {view.nodes_needed} nodes were there after {view.join_timeout_s:g} s (join_timeout_s)."
            f"{view.shortage and ' '}{view.shortage}{_told_aside(view)} Wait for nodes and resume the run, or resume it with "
            "fewer --nodes and --workers."
        )
        return Transition("failed", reason, REQUEUE)
    return None


def _train(view: JobView) -> Transition | None:
    attempt = view.attempt
    assert attempt is not None
    if attempt.is_done:
        return _finish(view, attempt)
    if reason := _failure(view, attempt):
        return Transition("recovering", reason, ends_ranks=True)
    if view.stop is not None:
        return Transition("stopping", f"asked to stop by {signal.Signals(view.stop.signal).name}")
    if view.state == "starting" and attempt.has_stepped:
        return Transition("training", "the first step is finished")
    return (_leave(view, attempt) or _grow(view, attempt)) if view.state == "training" else None


def _too_few(view: JobView) -> str | None:
    """Why a job need not wait for nodes at all: all are there, and too many of them are set aside."""
    is_waiting = any(state != "ready" for state in view.nodes.values())
    if not view.aside or view.attempt is not None or is_waiting or size_of_attempt(view) is not None:
        return None
    least = min((view.nodes_needed, *view.fewer_nodes))
    why = "; ".join(view.aside.values())
    return (
        f"{len(view.usable)} of {len(view.nodes)} nodes may be used, but the job needs {least}: {why}. Use other nodes or "
        "fewer of them, or allow these again with `evermesh uncordon NODE`."
    )


def _told_aside(view: JobView) -> str:
    return f" {'; '.join(view.aside.values())}." if view.aside else ""


def _leave(view: JobView, attempt: Attempt) -> Transition | None:
    """End an attempt behind a step, to go on without nodes that it is to leave, once others are there."""
    leaving = [node for node in attempt.nodes if node in view.leaving]
    size = size_of_attempt(view)
    if not leaving or size is None:
        return None
    told = "; ".join(view.aside[node] for node in leaving)
    others = f"going on with {size} of {view.nodes_needed} nodes, without {', '.join(leaving)}"
    return Transition("regrouping", f"{told}: {others}")


def _grow(view: JobView, attempt: Attempt) -> Transition | None:
    """End an attempt on fewer nodes behind a step, once more have been ready for long enough."""
    size = size_of_attempt(view)
    if view.grow_after_s is None or size is None or size <= len(attempt.nodes):
        return None
    if view.now_s - view.size_since_s <= view.grow_after_s:
        return None
    reason = f"{size} of {view.nodes_needed} nodes have been ready for {view.grow_after_s:g} s (grow_after_s)"
    return Transition("regrouping", f"{reason}: going on with them instead of {len(attempt.nodes)}")


def _regroup(view: JobView, attempt: Attempt) -> Transition | None:
    """Ranks have left the state in memory: the next attempt, as soon as they are gone."""
    if reason := _failure(view, attempt):
        return Transition("recovering", reason, ends_ranks=True)
    if not _is_over(view, attempt):
        return None
    if view.stop is not None:
        return Transition("stopped", "stopped between two attempts", exit_code(view))
    size = size_of_attempt(view)
    if size is None:
        return Transition("waiting", "too few nodes")
    return Transition("starting", f"regrouped: going on with {size} of {view.nodes_needed} nodes")


def _failure(view: JobView, attempt: Attempt) -> str | None:
    """Why the attempt has failed; None while it goes on, or while a better reason may still come."""
    if attempt.lost:
        return f"lost {', '.join(sorted(attempt.lost))}"
    if view.refusal is not None:
        return view.refusal
    if not attempt.failures or attempt.failed_s is None:
        return None
    first, waited_s = root_cause(attempt.failures), view.now_s - attempt.failed_s
    everybody_spoke = len({failure.rank for failure in attempt.failures}) + len(attempt.done) >= attempt.world_size
    is_sure = first.cause in ("died", "froze")
    patience_s = ROOT_CAUSE_WAIT_S if first.peer_lost else 0.0 if is_sure else SETTLE_S
    if first.peer_lost and any(view.nodes.get(node) == "cut off" for node in attempt.nodes):
        patience_s = math.inf  # the node is about to be found lost, or to say why
    return f"rank {first.rank} {first.how.splitlines()[0]}" if everybody_spoke or waited_s >= patience_s else None


def _stop(view: JobView) -> Transition | None:
    attempt, stop = view.attempt, view.stop
    assert attempt is not None
    assert stop is not None
    if attempt.is_done:
        return _finish(view, attempt)
    if attempt.is_ending:
        if not _is_over(view, attempt):
            return None
        how = "at once; steps after the last checkpoint are lost" if attempt.is_started else "before its ranks started"
        return Transition("stopped", f"stopped {how}", exit_code(view))
    if reason := _failure(view, attempt):
        return Transition("recovering", reason, ends_ranks=True)
    if not attempt.is_started:  # nobody is there who could save
        return Transition("stopping", "no rank has started yet", ends_ranks=True)
    if stop.at_once:
        return Transition("stopping", "asked to stop at once", ends_ranks=True)
    if stop.deadline_s is not None and view.now_s >= stop.deadline_s:
        return Transition("stopping", "the time to save is over (grace_s)", ends_ranks=True)
    return None


def _recover(view: JobView) -> Transition | None:
    attempt = view.attempt
    assert attempt is not None
    if not _is_over(view, attempt) or not attempt.is_counted:
        return None
    if view.refusal is not None:
        return Transition("failed", view.refusal, 1)
    answer = after_failure(view.history, view.max_restarts)
    if isinstance(answer, Finish):
        return Transition("failed", answer.reason, answer.exit_code)
    if view.stop is not None:
        reason = "stopped at once, for it failed; steps after the last checkpoint are lost"
        return Transition("stopped", reason, exit_code(view))
    if choose_nodes(view.usable, view.nodes_needed, attempt.nodes) is None:
        return Transition("waiting", f"{answer.reason}; too few nodes")
    return Transition("starting", answer.reason)


def _is_over(view: JobView, attempt: Attempt) -> bool:
    """Whether no process of the attempt is left, as far as anybody can know: a node that is not heard is not asked."""
    gone = attempt.over | attempt.lost
    return all(node in gone or view.nodes.get(node) != "ready" for node in attempt.nodes)


def _finish(view: JobView, attempt: Attempt) -> Transition | None:
    if attempt.has_regrouped:
        return _regroup(view, attempt)
    reason = attempt.done[0].get("reason", "finished")
    if reason == "finished":
        return Transition("finished", "every rank is done", 0)
    if reason == "asked" and view.stop is not None:
        return Transition("stopped", "saved and stopped, as asked", exit_code(view))
    return Transition("stopped", "reached stop_at", 0)
