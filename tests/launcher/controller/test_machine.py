"""What follows from what a controller sees: the table of transitions, and what holds for any sequence of events."""

import signal
from dataclasses import replace
from typing import Any

import pytest

from evermesh.launcher.controller.machine import (
    ROOT_CAUSE_WAIT_S,
    SETTLE_S,
    Attempt,
    JobView,
    Stop,
    choose_nodes,
    decide,
)
from evermesh.launcher.policy import FailedAttempt, Failure

NOW_S = 1000.0
DIED = Failure(rank=1, time_s=990.0, how="was killed by signal 9 (SIGKILL)", cause="died", code=-9)
RAISED = Failure(rank=1, time_s=990.0, how="failed: KeyError: 'x'\nsecond line", cause="raised")
REFUSED = Failure(rank=1, time_s=990.0, how="failed: no room", cause="refused")
PEER_LOST = Failure(rank=0, time_s=989.0, how="failed: Connection reset by peer", cause="raised", peer_lost=True)
FINISHED = {0: {"reason": "finished"}, 1: {"reason": "finished"}}
TERM, INT = Stop(signal.SIGTERM, False, None), Stop(signal.SIGINT, False, None)
NOW = Stop(signal.SIGINT, True, None)
NODES = {"node-0": "ready", "node-1": "ready"}
EVERYWHERE = frozenset(NODES)


def attempt(**changes: Any) -> Attempt:
    """Two ranks on two nodes, training."""
    base = Attempt(
        nodes=("node-0", "node-1"),
        world_size=2,
        done={},
        failures=(),
        failed_s=None,
        over=frozenset(),
        has_stepped=True,
        is_ending=False,
        is_counted=False,
    )
    return replace(base, **changes)


def failing(*failures: Failure, ago_s: float = 0.0, **changes: Any) -> Attempt:
    """An attempt whose first failure was told ``ago_s`` seconds ago."""
    return attempt(failures=failures, failed_s=NOW_S - ago_s, **changes)


def view(state: str, life: Attempt | None = None, **changes: Any) -> JobView:
    """Two nodes, ready, and three restarts."""
    base = JobView(
        state=state,  # type: ignore[arg-type]
        since_s=NOW_S - 1.0,
        now_s=NOW_S,
        nodes=NODES,  # type: ignore[arg-type]
        nodes_needed=2,
        join_timeout_s=60.0,
        max_restarts=3,
        history=(),
        attempt=life,
        stop=None,
    )
    return replace(base, **changes)


def failed(*failures: Failure, progressed: bool = True) -> FailedAttempt:
    return FailedAttempt(failures=failures or (DIED,), progressed=progressed)


ENDED = attempt(is_ending=True, over=EVERYWHERE, failures=(DIED,), failed_s=NOW_S - 5, is_counted=True)
ONE_MISSING = {"node-0": "ready", "node-1": "joining"}
ONE_CUT_OFF = {"node-0": "ready", "node-1": "cut off"}

WAITS = [
    ("too few nodes", view("placing", nodes=ONE_MISSING)),
    ("a node that is cut off does not count", view("placing", nodes=ONE_CUT_OFF)),
    ("until the join timeout", view("placing", nodes=ONE_MISSING, since_s=NOW_S - 60.0)),
    ("still waiting for nodes", view("waiting", ENDED, nodes=ONE_CUT_OFF)),
    (
        "ranks of the old attempt live on a node that came back",
        view("waiting", attempt(is_ending=True, is_counted=True, over=frozenset({"node-0"}))),
    ),
    ("no first step yet", view("starting", attempt(has_stepped=False))),
    ("it trains", view("training", attempt())),
    ("one rank is done, the other not yet", view("training", attempt(done={0: {"reason": "finished"}}))),
    ("a node is cut off, but training goes on", view("training", attempt(), nodes=ONE_CUT_OFF)),
    ("the peer may say why", view("training", failing(PEER_LOST, ago_s=ROOT_CAUSE_WAIT_S - 0.01))),
    ("or show that it is lost", view("training", failing(PEER_LOST, ago_s=ROOT_CAUSE_WAIT_S), nodes=ONE_CUT_OFF)),
    ("another rank may tell an earlier failure", view("training", failing(RAISED, ago_s=SETTLE_S - 0.01))),
    ("the checkpoint is being written", view("stopping", attempt(), stop=TERM)),
    ("there is time left", view("stopping", attempt(), stop=Stop(signal.SIGTERM, False, NOW_S + 0.01))),
    ("told to end at once, not yet over", view("stopping", attempt(is_ending=True), stop=NOW)),
    ("ranks of the failed attempt still end", view("recovering", failing(DIED, is_ending=True))),
    ("over, but not in the history yet", view("recovering", replace(ENDED, is_counted=False))),
    ("one node is over, the other not", view("recovering", replace(ENDED, over=frozenset({"node-0"})))),
    *[(f"{state} is the end", view(state, ENDED, stop=NOW, refusal="x")) for state in ("finished", "stopped", "failed")],
]  # fmt: skip


@pytest.mark.parametrize(("situation", "seen"), WAITS, ids=[name for name, _ in WAITS])
def test_nothing_follows_while(situation: str, seen: JobView) -> None:
    assert decide(seen) is None, situation


MOVES = [
    ("placing", view("placing"), ("starting", "2 of 2 nodes are ready", None, False)),
    ("more nodes than needed", view("placing", nodes={**NODES, "node-2": "ready"}),
     ("starting", "3 of 2 nodes are ready", None, False)),
    ("stop before the start", view("placing", stop=INT), ("stopped", "stopped before it could start", 130, False)),
    ("stop while waiting", view("waiting", ENDED, stop=TERM), ("stopped", "stopped before it could start", 143, False)),
    ("refused", view("placing", refusal="node-0 ended before it joined: x"),
     ("failed", "node-0 ended before it joined: x", 1, False)),
    ("nodes are back", view("waiting", ENDED), ("starting", "2 of 2 nodes are ready", None, False)),
    ("first step", view("starting", attempt()), ("training", "the first step is finished", None, False)),
    ("stop while starting", view("starting", attempt(has_stepped=False), stop=INT),
     ("stopping", "asked to stop by SIGINT", None, False)),
    ("stop while training", view("training", attempt(), stop=TERM),
     ("stopping", "asked to stop by SIGTERM", None, False)),
    ("a rank died", view("training", failing(DIED)),
     ("recovering", "rank 1 was killed by signal 9 (SIGKILL)", None, True)),
    ("a rank died while starting", view("starting", failing(DIED, has_stepped=False)),
     ("recovering", "rank 1 was killed by signal 9 (SIGKILL)", None, True)),
    ("a rank raised, and nobody else", view("training", failing(RAISED, ago_s=SETTLE_S + 1e-6)),
     ("recovering", "rank 1 failed: KeyError: 'x'", None, True)),
    ("the cause is told after the consequence", view("training", failing(PEER_LOST, DIED)),
     ("recovering", "rank 1 was killed by signal 9 (SIGKILL)", None, True)),
    ("everybody lost a peer", view("training", failing(PEER_LOST, PEER_LOST.model_copy(update={"rank": 1}))),
     ("recovering", "rank 0 failed: Connection reset by peer", None, True)),
    ("the peer says nothing", view("training", failing(PEER_LOST, ago_s=ROOT_CAUSE_WAIT_S)),
     ("recovering", "rank 0 failed: Connection reset by peer", None, True)),
    ("the other is done already", view("training", failing(RAISED, done={0: {}})),
     ("recovering", "rank 1 failed: KeyError: 'x'", None, True)),
    ("a node is lost", view("training", attempt(lost=frozenset({"node-1"})), nodes={**NODES, "node-1": "lost"}),
     ("recovering", "lost node-1", None, True)),
    ("a node cannot start its ranks", view("starting", attempt(has_stepped=False), refusal="node-1: no room"),
     ("recovering", "node-1: no room", None, True)),
    ("failed before stopping", view("training", failing(DIED), stop=TERM),
     ("recovering", "rank 1 was killed by signal 9 (SIGKILL)", None, True)),
    ("finished", view("training", attempt(done=FINISHED)), ("finished", "every rank is done", 0, False)),
    ("finished before it was seen to step", view("starting", attempt(done=FINISHED, has_stepped=False)),
     ("finished", "every rank is done", 0, False)),
    ("all done, then a node was lost", view("training", attempt(done=FINISHED, lost=frozenset({"node-1"}))),
     ("finished", "every rank is done", 0, False)),
    ("stop_at", view("training", attempt(done={0: {"reason": "stop_at"}, 1: {"reason": "stop_at"}})),
     ("stopped", "reached stop_at", 0, False)),
    ("saved as asked", view("stopping", attempt(done={0: {"reason": "asked"}, 1: {"reason": "asked"}}), stop=INT),
     ("stopped", "saved and stopped, as asked", 130, False)),
    ("finished while stopping", view("stopping", attempt(done=FINISHED), stop=TERM),
     ("finished", "every rank is done", 0, False)),
    ("at once", view("stopping", attempt(), stop=NOW), ("stopping", "asked to stop at once", None, True)),
    ("grace is over", view("stopping", attempt(), stop=Stop(signal.SIGTERM, False, NOW_S)),
     ("stopping", "the time to save is over (grace_s)", None, True)),
    ("nothing has started", view("stopping", attempt(is_started=False, has_stepped=False), stop=INT),
     ("stopping", "no rank has started yet", None, True)),
    ("ended at once", view("stopping", attempt(is_ending=True, over=EVERYWHERE), stop=NOW),
     ("stopped", "stopped at once; steps after the last checkpoint are lost", 130, False)),
    ("ended before its ranks started",
     view("stopping", attempt(is_ending=True, over=EVERYWHERE, is_started=False), stop=TERM),
     ("stopped", "stopped before its ranks started", 143, False)),
    ("a failure while stopping", view("stopping", failing(DIED), stop=TERM),
     ("recovering", "rank 1 was killed by signal 9 (SIGKILL)", None, True)),
    ("restart", view("recovering", ENDED, history=(failed(),)), ("starting", "restart 1 of 3", None, False)),
    ("restart with one node gone that is not heard",
     view("recovering", replace(ENDED, over=frozenset({"node-0"})), history=(failed(),), nodes=ONE_CUT_OFF),
     ("waiting", "restart 1 of 3; too few nodes", None, False)),
    ("a spare takes the place",
     view("recovering", replace(ENDED, over=frozenset({"node-0"})), history=(failed(),),
          nodes={**ONE_CUT_OFF, "node-2": "ready"}),
     ("starting", "restart 1 of 3", None, False)),
    ("a lost node that is back with another agent",
     view("recovering", replace(ENDED, over=frozenset({"node-0"}), lost=frozenset({"node-1"})), history=(failed(),)),
     ("starting", "restart 1 of 3", None, False)),
    ("no restarts left", view("recovering", ENDED, history=(failed(),) * 4),
     ("failed", "3 of 3 restarts are used", 1, False)),
    ("no progress", view("recovering", ENDED, history=(failed(progressed=False),) * 3),
     ("failed", "3 attempts in a row made no progress", 93, False)),
    ("refused by a rank", view("recovering", ENDED, history=(failed(REFUSED),)),
     ("failed", "the error says what to change; starting again would not change it", 1, False)),
    ("refused by a node", view("recovering", ENDED, history=(failed(),), refusal="node-1: no room"),
     ("failed", "node-1: no room", 1, False)),
    ("stop while recovering", view("recovering", ENDED, history=(failed(),), stop=TERM),
     ("stopped", "stopped at once, for it failed; steps after the last checkpoint are lost", 143, False)),
    ("stop while recovering, to be requeued",
     view("recovering", ENDED, history=(failed(),), stop=TERM, requeue_on_term=True),
     ("stopped", "stopped at once, for it failed; steps after the last checkpoint are lost", 75, False)),
]  # fmt: skip


@pytest.mark.parametrize(("situation", "seen", "expected"), MOVES, ids=[name for name, _, _ in MOVES])
def test_what_follows(situation: str, seen: JobView, expected: tuple[Any, ...]) -> None:
    found = decide(seen)
    assert found is not None, situation
    assert (found.to, found.reason, found.exit_code, found.ends_ranks) == expected


def test_nodes_that_never_come_end_the_job_with_75_and_say_why() -> None:
    found = decide(view("placing", nodes=ONE_MISSING, since_s=NOW_S - 60.1, shortage="The cluster is full."))
    assert found is not None
    assert (found.to, found.exit_code) == ("failed", 75)
    assert found.reason.startswith("1 of 2 nodes were there after 60 s (join_timeout_s). The cluster is full. Wait for")


@pytest.mark.parametrize(
    ("stop", "requeues", "code"), [(TERM, False, 143), (TERM, True, 75), (INT, False, 130), (INT, True, 130)]
)
def test_the_exit_code_tells_which_signal_asked(stop: Stop, requeues: bool, code: int) -> None:
    done = attempt(done={0: {"reason": "asked"}, 1: {"reason": "asked"}})
    found = decide(view("stopping", done, stop=stop, requeue_on_term=requeues))
    assert found is not None
    assert (found.to, found.exit_code) == ("stopped", code)


@pytest.mark.parametrize(
    ("states", "before", "expected"),
    [
        ("rr", (), "01"),
        ("rrr", (), "01"),
        ("rj", (), None),
        ("rrr", "12", "12"),
        ("rcr", "01", "02"),
        ("lrr", "01", "21"),
        ("llrr", "01", "23"),
        ("rrr", "20", "20"),
        ("rlc", "01", None),
    ],
)
def test_nodes_keep_their_places_and_spares_take_free_ones(
    states: str, before: str | tuple[()], expected: str | None
) -> None:
    names = {"r": "ready", "j": "joining", "c": "cut off", "l": "lost"}
    nodes: Any = {str(number): names[state] for number, state in enumerate(states)}
    assert choose_nodes(nodes, 2, tuple(before)) == (None if expected is None else tuple(expected))


FEWER: dict[str, Any] = {"fewer_nodes": (2, 1), "nodes_needed": 3, "shrink_after_s": 5.0}


def _three(states: str) -> Any:
    names = {"r": "ready", "j": "joining", "c": "cut off", "l": "lost"}
    return {f"node-{number}": names[state] for number, state in enumerate(states)}


@pytest.mark.parametrize(
    ("states", "waited_s", "expected"),
    [
        ("rrj", 4.9, None),
        ("rrj", 5.1, "2 of 3 nodes were there after 5 s; going on with 2, with the same batches"),
        ("rlc", 5.1, "1 of 3 nodes were there after 5 s; going on with 1, with the same batches"),
        ("jlc", 5.1, None),
        ("rrr", 0.0, "3 of 3 nodes are ready"),
    ],
)
def test_f9_a_job_goes_on_with_fewer_nodes_after_a_short_wait(
    states: str, waited_s: float, expected: str | None
) -> None:
    seen = view("waiting", ENDED, nodes=_three(states), since_s=NOW_S - waited_s, **FEWER)
    found = decide(seen)
    assert (found.reason if found else None) == expected
    assert found is None or found.to == "starting"


def test_a_job_that_has_not_begun_waits_longer_for_all_its_nodes() -> None:
    seen = view("placing", nodes=_three("rrj"), since_s=NOW_S - 59.0, **FEWER)
    assert decide(seen) is None
    found = decide(replace(seen, since_s=NOW_S - 60.1))
    assert found is not None
    assert (found.to, found.reason.split(";")[1]) == ("starting", " going on with 2, with the same batches")
    assert decide(replace(seen, since_s=NOW_S - 60.1, fewer_nodes=())).to == "failed"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("states", "needed", "before", "expected"),
    [
        ("lr", 1, "01", "1"),
        ("lrr", 2, "012", "12"),
        ("rrr", 3, "12", "120"),
        ("rr", 1, "01", "0"),
        ("rlr", 2, "01", "02"),
        ("ll", 1, "01", None),
    ],
)
def test_who_is_left_moves_up_and_who_comes_back_is_last(
    states: str, needed: int, before: str, expected: str | None
) -> None:
    nodes = {name.removeprefix("node-"): state for name, state in _three(states).items()}
    assert choose_nodes(nodes, needed, tuple(before)) == (None if expected is None else tuple(expected))


REGROUPED = {0: {"reason": "regroup"}}


def _shrunk(state: str = "training", **changes: Any) -> JobView:
    """An attempt on one of two nodes, both of which have been ready for 300 s."""
    life = attempt(nodes=("node-0",), world_size=1, **changes.pop("attempt", {}))
    smaller: dict[str, Any] = {"fewer_nodes": (1,), "grow_after_s": 300.0, "size_since_s": NOW_S - 300.1}
    return view(state, life, **smaller | changes)


def _gone(**changes: Any) -> dict[str, Any]:
    """Its ranks have regrouped."""
    return {"done": REGROUPED, "over": frozenset({"node-0"})} | changes


GROWS = [
    ("not there for long enough", _shrunk(size_since_s=NOW_S - 299.9), None),
    ("off", _shrunk(grow_after_s=None), None),
    ("nobody has come back", _shrunk(nodes=ONE_MISSING), None),
    ("no step yet", _shrunk("starting", attempt={"has_stepped": False}), None),
    ("on all nodes", view("training", attempt(), grow_after_s=300.0, size_since_s=0.0), None),
    ("it grows", _shrunk(), ("regrouping", "2 of 2 nodes have been ready for 300 s (grow_after_s): going on with them "
                             "instead of 1", None, False)),
    ("to as many as there are", _shrunk(nodes_needed=3, fewer_nodes=(2, 1)),
     ("regrouping", "2 of 3 nodes have been ready for 300 s (grow_after_s): going on with them instead of 1", None, False)),
    ("a stop comes first", _shrunk(stop=TERM), ("stopping", "asked to stop by SIGTERM", None, False)),
    ("the step is under way", _shrunk("regrouping"), None),
    ("a rank died meanwhile", _shrunk("regrouping", attempt={"failures": (DIED,), "failed_s": NOW_S}),
     ("recovering", "rank 1 was killed by signal 9 (SIGKILL)", None, True)),
    ("the run ended with this step", _shrunk("regrouping", attempt=_gone(done={0: {"reason": "finished"}})),
     ("finished", "every rank is done", 0, False)),
    ("its processes still end", _shrunk("regrouping", attempt=_gone(over=frozenset())), None),
    ("regrouped", _shrunk("regrouping", attempt=_gone()),
     ("starting", "regrouped: going on with 2 of 2 nodes", None, False)),
    ("the other has gone again", _shrunk("regrouping", attempt=_gone(), nodes=ONE_MISSING),
     ("starting", "regrouped: going on with 1 of 2 nodes", None, False)),
    ("too few are left", _shrunk("regrouping", attempt=_gone(), nodes=ONE_CUT_OFF, fewer_nodes=()),
     ("waiting", "too few nodes", None, False)),
    ("the node is lost with its ranks done", _shrunk("regrouping", attempt=_gone(lost=frozenset({"node-0"}))),
     ("recovering", "lost node-0", None, True)),
    ("a stop before it was seen", _shrunk("stopping", attempt=_gone(), stop=TERM),
     ("stopped", "stopped between two attempts", 143, False)),
    ("a stop after it", _shrunk("regrouping", attempt=_gone(), stop=INT),
     ("stopped", "stopped between two attempts", 130, False)),
]  # fmt: skip


@pytest.mark.parametrize(("situation", "seen", "expected"), GROWS, ids=[name for name, _, _ in GROWS])
def test_a_job_on_fewer_nodes_goes_on_with_more_behind_a_step(
    situation: str, seen: JobView, expected: tuple[Any, ...] | None
) -> None:
    found = decide(seen)
    told = found and (found.to, found.reason, found.exit_code, found.ends_ranks)
    assert told == expected, situation
