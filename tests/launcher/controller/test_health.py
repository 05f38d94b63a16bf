"""What the controller makes of what agents find out about their nodes."""

from collections.abc import Sequence

from evermesh.fault.events import read_events
from evermesh.fault.health.verdicts import Verdict
from tests.launcher.controller.worlds import World, world

FINE, POOR = Verdict("GPU 0 memory", "ok", "fine"), Verdict("clock", "warn", "off")
BROKEN = Verdict("GPU 0 memory", "bad", "2 errors could not be corrected", {"uncorrected": 2.0}, "reset the GPU")


def states(job: World) -> dict[str, str]:
    return dict(job.controller.nodes.states())


def told(job: World, kind: str) -> list[str]:
    return [event.text for event in read_events(job.run.events) if event.kind == kind]


def test_a_node_that_says_at_first_that_it_is_unfit_is_refused_and_the_spare_is_used() -> None:
    with world() as job:
        job.agents["node-0"].verdicts = (BROKEN, POOR)
        job.settle(2)
        assert states(job) == {"node-0": "refused", "node-1": "ready", "node-2": "ready"}
        assert job.controller.life is not None
        assert job.controller.life.nodes == ("node-1", "node-2")
        [text] = told(job, "node refused")
        assert text == (
            "node-0 (here) is not used. GPU 0 memory: 2 errors could not be corrected. Way out: reset the GPU."
        )
        assert told(job, "health") == [f"node-0: {BROKEN.told}", f"node-0: {POOR.told}"]
        job.settle(5)
        assert states(job)["node-0"] == "refused"
        job.agents["node-0"].find_out(FINE, POOR)
        assert states(job)["node-0"] == "ready"
        assert told(job, "node back") == ["node-0 is fit again"]


def test_a_job_without_enough_fit_nodes_fails_at_once_unless_preflight_is_off() -> None:
    with world() as job:
        for name in ("node-0", "node-2"):
            job.agents[name].verdicts = (BROKEN,)
        job.settle(1)
        assert job.controller.state == "failed"
        assert job.controller.record.exit_code == 1
        assert job.controller.record.reason.startswith(
            "1 nodes are left, but the job needs 2. node-0 (here) was refused: "
        )
    with world(preflight="off") as job:
        for agent in job.agents.values():
            agent.verdicts = (BROKEN,)
        job.settle(1)
        assert set(states(job).values()) == {"ready"}
        assert len(told(job, "health")) == 3, "what is known is told, and nothing follows"


def test_a_job_that_may_shrink_waits_for_others_and_goes_on_with_the_nodes_that_are_fit() -> None:
    with world(workers=3, nodes=3, spares=0, min_nodes=2) as job:
        job.agents["node-0"].verdicts = (BROKEN,)
        job.settle(1)
        assert job.controller.state == "placing"
        job.settle(job.config.join_timeout_s + 1)
        assert job.controller.life is not None
        assert job.controller.life.nodes == ("node-1", "node-2")


def test_a_node_that_trains_is_never_refused_but_who_listens_is_told_of_every_change_once() -> None:
    heard: list[tuple[str, Sequence[Verdict]]] = []
    with world() as job:
        job.controller.health.listeners.append(lambda node, verdicts: heard.append((node, verdicts)))
        job.settle(2)
        assert heard == []
        training, spare = job.agents["node-0"], job.agents["node-2"]
        training.find_out(BROKEN, POOR)
        training.find_out(BROKEN, POOR)
        spare.find_out(BROKEN)
        assert heard == [("node-0", [BROKEN, POOR]), ("node-2", [BROKEN])]
        assert states(job) == {"node-0": "ready", "node-1": "ready", "node-2": "refused"}
        training.find_out(FINE)
        assert heard[2] == ("node-0", [FINE, Verdict("clock", "ok", "is not seen any more")])
        training.cut()
        job.settle(2)
        assert len(heard) == 3, "said again with the next hello, which is nothing new"


def test_a_refused_spare_is_lost_like_any_other_and_is_not_taken_for_a_lost_node() -> None:
    with world() as job:
        job.settle(2)
        job.agents["node-2"].find_out(BROKEN)
        job.agents["node-0"].die()
        job.settle(3)
        assert job.controller.life is not None
        assert "node-2" not in job.controller.life.nodes
        job.agents["node-2"].die()
        job.advance()
        job.advance()
        assert told(job, "node lost")[-1].startswith("node-2 was lost")
        job.settle(2)
        assert states(job)["node-2"] == "ready", "another agent found nothing wrong"
