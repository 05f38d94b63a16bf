"""What holds whatever happens, and in whatever order: random sequences of events, and controllers killed anywhere."""

import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evermesh.launcher.controller.journal import Entry, read_journal
from evermesh.launcher.controller.status import ENDED
from evermesh.launcher.errors import DrainRefused
from tests.launcher.controller.worlds import World, world

EVENTS = (
    "connect", "cut", "take", "take", "take", "beat", "step", "fail", "lose peer", "finish", "finish asked", "die",
    "wait", "wait long", "stop", "stop at once", "save", "revive", "drain",
)  # fmt: skip
NODES = ("node-0", "node-1", "node-2")
STARTS = ("at once", "quietly", "regrouping")
LONG_ENOUGH_S = 15.0
ELASTIC = {"workers": 3, "nodes": 3, "spares": 0, "min_nodes": 2, "shrink_after_s": 0.5, "grow_after_s": 0.5}


def happen(job: World, event: str, node: str) -> None:
    """One event of the world."""
    agent, controller = job.agents[node], job.controller
    match event:
        case "connect":
            agent.connect()
        case "cut":
            agent.cut()
        case "take":
            agent.take()
        case "beat":
            agent.beat()
        case "step":
            train(job)
            agent.beat()
        case "fail" | "lose peer":
            agent.fail(peer_lost=event == "lose peer")
        case "finish":
            agent.finish("finished")
        case "finish asked" if agent.ranks is not None and agent.ranks.asked is not None:
            agent.finish("asked" if agent.ranks.asked == "stop" else "regroup")
        case "die":
            agent.die()
        case "stop" | "stop at once":
            controller.stop(signal.SIGTERM, at_once=event == "stop at once", grace_s=None)
        case "save":
            controller.save()
        case "drain":
            with suppress(DrainRefused):
                controller.drain(node, "somebody", "it may be anything")
        case "revive":
            job.revive()
    job.advance({"wait": 0.3, "wait long": 3.0}.get(event, 0.0))


def still_living(job: World, nodes: tuple[str, ...], generation: int) -> list[str]:
    """Of ``nodes`` those that count as ready while ranks of this generation, or of an older one, live there."""
    states = job.controller.nodes.states()
    agents = [job.agents[name] for name in nodes if states[name] == "ready" and job.agents[name].node is not None]
    return [
        agent.name
        for agent in agents
        if agent.has_living_ranks and agent.ranks and agent.ranks.generation <= generation
    ]


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.sampled_from(NODES)), max_size=60), st.sampled_from(STARTS))
def test_whatever_happens_no_two_generations_live_and_a_stopped_job_ends(
    events: list[tuple[str, str]], start: str
) -> None:
    with world(**(ELASTIC if start == "regrouping" else {})) as job:
        if start == "quietly":
            job.settle(2.0)
        elif start == "regrouping":
            shrinking(job)
            job.settle(1.5)
            assert job.controller.state == "regrouping"
        for event, node in events:
            state, generation, life = job.controller.state, job.controller.generation, job.controller.life
            happen(job, event, node)
            if state in ENDED:
                assert job.controller.state == state
            if job.controller.generation > generation:
                assert job.controller.generation == generation + 1
                assert still_living(job, life.nodes if life else (), generation) == []
        if job.controller.state not in ENDED:
            job.controller.stop(signal.SIGINT, at_once=True, grace_s=None)
        job.settle(LONG_ENOUGH_S)
        assert job.controller.state in ENDED
        assert job.run.state().state == job.controller.state
        assert not any(agent.has_living_ranks for agent in job.agents.values() if agent.is_alive)
        kinds = [entry.fields.get("to") for entry in read_journal(job.run.journal)]
        assert sum(kind in ENDED for kind in kinds) == 1


def eventful(job: World) -> None:
    """Two failures, one of them the loss of a node, a stop, and the end."""
    job.settle(1.0)
    step(job)
    job.agents["node-1"].fail(peer_lost=False)
    job.settle(1.0)
    step(job)
    job.agents["node-0"].die()
    job.settle(1.0)
    step(job)
    _stop(job)


def _stop(job: World) -> None:
    """As somebody asks for it, and ranks do it."""
    job.controller.stop(signal.SIGTERM, at_once=False, grace_s=25.0)
    job.settle(0.5)
    for agent in job.agents.values():
        agent.finish("asked")
    job.settle(0.5)


def growing(job: World) -> None:
    """The loss of a node, after which the job goes on with the others; its return, and a stop."""
    shrinking(job)
    job.settle(1.5)
    step(job)
    job.settle(1.0)
    step(job)
    _stop(job)


def shrinking(job: World) -> None:
    """The loss of a node, after which the job goes on with the others; it is about to come back."""
    job.settle(1.0)
    step(job)
    job.absent.add("node-1")
    job.agents["node-1"].die()
    job.settle(2.0)
    step(job)
    job.absent.clear()


def step(job: World) -> None:
    train(job)
    job.settle(0.5)


def train(job: World) -> None:
    """All ranks finish a step, behind which they do what they were asked for, unless it is the end."""
    for agent in job.agents.values():
        if agent.ranks is not None and agent.has_living_ranks:
            agent.ranks.step += 1
            if agent.ranks.asked == "regroup":
                agent.finish("regroup")


def test_two_failures_and_a_stop_are_written_down_in_order() -> None:
    with world() as job:
        eventful(job)
        told = [str(entry.fields["to"]) for entry in read_journal(job.run.journal) if entry.kind == "transition"]
    again = ["recovering", "starting", "training"]
    assert told == ["starting", "training", *again, *again, "stopping", "stopped"]
    assert job.controller.record.exit_code == 143


class Killed(BaseException):
    """The controller, right after it wrote an entry."""


def kill_after(job: World, entries: int) -> None:
    """Have the next eventful controller die when its journal has this many entries."""
    append = job.journal.append

    def append_and_die(*what: Any, **fields: Any) -> Entry:
        entry = append(*what, **fields)
        if entry.seq == entries:
            raise Killed
        return entry

    job.journal.append = append_and_die  # type: ignore[method-assign]


def test_a_return_is_no_failure_and_is_written_down_in_order() -> None:
    with world(**ELASTIC) as job:
        growing(job)
        entries = read_journal(job.run.journal)
        told = [str(entry.fields["to"]) for entry in entries if entry.kind == "transition"]
        sizes = [len(entry.fields["nodes"]) for entry in entries if entry.kind == "attempt"]  # type: ignore[arg-type]
        assert len(job.controller.record.history) == 1, "the lost node"
    shrunk = ["recovering", "waiting", "starting", "training"]
    assert told == ["starting", "training", *shrunk, "regrouping", "starting", "training", "stopping", "stopped"]
    assert sizes == [3, 2, 3]


@pytest.mark.parametrize("are_lost", [False, True], ids=["agents live", "agents died too"])
@pytest.mark.parametrize(("happens", "changes"), [(eventful, {}), (growing, ELASTIC)])
def test_a_controller_killed_after_any_entry_is_followed_by_one_that_goes_on(
    happens: Callable[[World], None], changes: dict[str, Any], are_lost: bool
) -> None:
    with world(**changes) as recorded:
        happens(recorded)
        entries = read_journal(recorded.run.journal)
    for killed_after in entries[1:]:
        with world(**changes) as job:
            kill_after(job, killed_after.seq)
            with pytest.raises(Killed):
                happens(job)
            job.absent.clear()
            for agent in job.agents.values() if are_lost else ():
                agent.die()
            job.revive()
            for _ in range(3):
                job.settle(3.0)
                step(job)
            if job.controller.record.exit_code == 93:  # its third attempt without a checkpoint
                assert are_lost
                assert killed_after.generation == 3
                continue
            if job.controller.record.stop is None:
                assert job.controller.state in ("training", "regrouping"), killed_after
                continue
            for agent in job.agents.values():
                agent.finish("asked")
            job.settle(1.0)
            assert (job.controller.state, job.run.state().state) == ("stopped", "stopped"), killed_after
            assert job.run.state().exit_code == 143


def refuse_at(job: World, number: int) -> None:
    """Have the disk be full when the entry with this number is to be written, once."""
    append, refused = job.journal.append, list[int]()

    def append_if_there_is_room(*what: Any, **fields: Any) -> Entry:
        if len(job.journal.entries) + 1 == number and not refused:
            refused.append(number)
            raise OSError(28, "No space left on device")
        return append(*what, **fields)

    job.journal.append = append_if_there_is_room  # type: ignore[method-assign]


def test_an_entry_that_cannot_be_written_at_first_is_no_reason_to_end_the_job() -> None:
    with world() as recorded:
        eventful(recorded)
        entries = read_journal(recorded.run.journal)
    for refused in entries[1:]:
        with world() as job:
            refuse_at(job, refused.seq)
            try:
                eventful(job)
            except OSError:
                assert refused.kind == "stop"  # who asks is told, and asks again
                continue
            job.settle(1.0)
            assert (job.controller.state, job.run.state().exit_code) == ("stopped", 143), refused
