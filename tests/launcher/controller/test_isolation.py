"""What a controller does about nodes that something speaks against; agents are only told of."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evermesh.fault.cluster.identity import NodeIdentity
from evermesh.fault.cluster.records import Cordon, Evidence, Uncordon
from evermesh.fault.cluster.standing import standing_cordons
from evermesh.fault.cluster.store import ClusterStore
from evermesh.fault.detectors import kinds
from evermesh.fault.events import Event, Finding, read_events
from evermesh.launcher.controller.life import Life
from evermesh.launcher.controller.node_evidence import of_failure, of_findings
from evermesh.launcher.errors import DrainRefused
from evermesh.launcher.messages import Speeds, ToAgentAdapter
from evermesh.launcher.policy import Failure
from tests.launcher.controller.test_sequences import step
from tests.launcher.controller.worlds import World, world

ACT: dict[str, Any] = {"isolation": {"mode": "act", "false_alarm_s": 0}}
SLOW = Finding(kind=kinds.SLOW_RANK, rank=1, evidence={"ratio": 1.5}, text="rank 1 computes longer", confidence=0.9)


@dataclass(frozen=True)
class Checked:
    """What a health check says."""

    state: str
    check: str = "disk"
    reason: str = "17 errors"


BAD = [Checked("ok"), Checked("bad")]


def events(job: World, kind: str = "isolation") -> list[Event]:
    return [event for event in read_events(job.run.events) if event.kind == kind] if job.run.events.is_file() else []


def training(job: World) -> None:
    """All three nodes are there, and ranks train on the first two."""
    job.settle(1.0)
    step(job)
    assert job.controller.state == "training"


def records(job: World) -> list[Any]:
    job.controller.isolation.close()
    return list(ClusterStore(Path(str(job.config.cluster))).read().records)


def told_speeds(job: World, node: str = "node-0") -> list[dict[int, float]]:
    inbox, found = job.agents[node].inbox, []
    while not inbox.empty():
        message = ToAgentAdapter.validate_json(inbox.get_nowait())
        found += [message.speeds] if isinstance(message, Speeds) else []
    return found


def test_a_slow_rank_gets_less_to_do_until_that_is_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    with world(**ACT) as job:
        training(job)
        job.controller.isolation.on_findings([SLOW] * 5)
        job.advance()
        assert told_speeds(job) == [{1: pytest.approx(1 / 1.5)}]
        (event,) = events(job)
        assert (event.fields["node"], event.fields["action"], event.fields["carried_out"]) == (
            "node-1",
            "degrade",
            True,
        )
        assert len(records(job)) == 1, "what is said again and again is said once"
        job.controller.isolation.on_findings([SLOW])
        job.settle(1.0)
        assert told_speeds(job) == [], "it is known"
        job.agents["node-0"].cut()
        job.agents["node-0"].connect()
        job.advance()
        assert told_speeds(job) == [{1: pytest.approx(1 / 1.5)}], "it may have been lost with the connection"
        later_s = records(job)[0].time_s + 4 * 3600.0
        monkeypatch.setattr("evermesh.launcher.controller.isolation.time.time", lambda: later_s)
        job.controller.isolation._decided_s = float("-inf")
        job.advance()
        assert told_speeds(job) == [{}], "all are nominal"
        assert [event.fields["action"] for event in events(job)] == ["degrade", "nothing"]
        assert events(job)[-1].text.endswith("its ranks get their whole share again")


def test_the_next_controller_knows_who_gets_less_to_do_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "evermesh.launcher.controller.isolation.read_injection", lambda run: object()
    )  # nothing is stored
    with world(**ACT) as job:
        training(job)
        job.controller.isolation.on_findings([SLOW])
        job.advance()
        job.revive()
        job.settle(1.0)
        slowed = job.controller.record.slowed
        assert slowed["node-1"].slowdown == 1.5
        job.settle(12.0)
        assert [event.fields["action"] for event in events(job)] == ["degrade"], "nothing was decided anew, or undone"
        job.agents["node-1"].fail(peer_lost=False)
        job.settle(1.0)
        told_speeds(job)
        step(job)
        job.settle(0.5)
        assert job.controller.state == "training"
        assert job.controller.isolation._degraded._sent == (job.controller.generation, {1: 1 / 1.5}), (
            "of other ranks, too"
        )
        job.controller.drain("node-1", "me", "")
        assert not slowed, "what is left has no share"


def test_a_share_that_was_degraded_stays_so_while_the_node_is_late_though_it_does_not_help() -> None:
    with world(**ACT) as job:
        training(job)
        isolation = job.controller.isolation
        isolation.on_findings([SLOW])
        job.advance()
        isolation._costs.residual_of = lambda node, slowdown: 3.0  # type: ignore[method-assign]
        isolation._decided_s = float("-inf")
        job.advance()
        assert [event.fields["action"] for event in events(job)] == ["degrade"]


def test_of_two_spares_that_takes_the_place_which_nothing_speaks_against() -> None:
    with world(**ACT, spares=2) as job:
        seen = Evidence(time_s=time.time() - 60, node=NodeIdentity(name="here/node-2"), kind="node lost")
        ClusterStore(Path(str(job.config.cluster))).add([seen])
        job.controller.isolation._desk._exchange()
        training(job)
        job.absent.add("node-1")
        job.agents["node-1"].die()
        job.settle(2.0)
        life = job.controller.life
        assert life is not None
        assert life.nodes == ("node-0", "node-3")
        assert job.controller.job.suspected["node-2"] == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("changes", [{}, {"isolation": "off"}])
def test_advice_is_told_and_not_followed_and_nothing_is_said_where_that_is_off(changes: dict[str, Any]) -> None:
    with world(**changes) as job:
        training(job)
        job.controller.isolation.on_findings([SLOW])
        job.controller.isolation.on_verdicts("node-1", BAD)
        job.settle(1.0)
        assert job.controller.state == "training"
        told = [(event.fields["action"], event.fields["carried_out"]) for event in events(job)]
        assert told == ([] if changes else [("drain", False)])
        assert [record.kind for record in records(job)] == ([] if changes else ["slow rank", "health bad"])
        assert not job.controller.job.aside


def leaves(job: World) -> None:
    """Ranks do what they were asked for, and the next attempt trains."""
    assert job.controller.state == "regrouping"
    step(job)
    job.settle(1.0)
    step(job)


def test_a_node_that_health_checks_reject_is_left_for_a_spare_and_the_budget_saves_the_next() -> None:
    with world(**ACT, spares=2) as job:
        training(job)
        job.controller.isolation.on_verdicts("node-1", BAD)
        job.settle(0.5)
        leaves(job)
        life = job.controller.life
        assert life is not None
        assert life.nodes == ("node-0", "node-2")
        (event,) = events(job)
        assert event.text.startswith(
            "going on without node-1: 0.80 (health 0.80) that it is at fault; this should cost"
        )
        (cordon,) = standing_cordons(records(job), event.time_s)
        assert (cordon.node, cordon.until_s is not None) == ("here/node-1", True)
        job.controller.isolation.on_verdicts("node-0", BAD)
        job.settle(0.5)
        assert events(job)[-1].fields["action"] == "watch"
        assert "drain is held back: 1 of 1 nodes that may be at a time (2% of 4) are set aside" in events(job)[-1].text
        assert job.controller.state == "training"


def test_what_cannot_be_trusted_is_replaced_at_once() -> None:
    with world(**ACT) as job:
        training(job)
        job.controller.isolation.on_findings([Finding(kind="silent corruption", rank=1, text="x", confidence=0.95)])
        job.settle(1.0)
        life = job.controller.life
        assert life is not None
        assert life.nodes == ("node-0", "node-2")
        assert [(event.fields["action"], event.fields["node"]) for event in events(job)] == [("replace", "node-1")]
        assert len(job.controller.record.history) == 1, "as a lost node"


def test_a_drain_outlives_its_controller_and_ends_when_the_node_is_uncordoned() -> None:
    with world() as job:
        training(job)
        assert job.controller.drain("node-1", "me@here", "fan") == "node-1"
        job.settle(0.5)
        leaves(job)
        job.revive()
        job.settle(1.0)
        assert job.controller.job.aside == {"node-1": "node-1 is drained by me@here: fan"}
        job.agents["node-2"].fail(peer_lost=False)
        job.settle(1.0)
        life = job.controller.life
        assert life is not None
        assert life.nodes == ("node-0", "node-2")
        store = ClusterStore(Path(str(job.config.cluster)))
        store.add([Uncordon(time_s=records(job)[-1].time_s + 1, node="here/node-1", by="me")])
        job.controller.isolation._desk._exchange()
        job.controller.isolation._looked_s = float("-inf")
        job.settle(0.5)
        assert job.controller.job.aside == {}
        assert events(job)[-1].fields["action"] == "return"
        assert not job.controller.record.drained


def test_a_job_is_not_drained_below_what_it_needs() -> None:
    with world(workers=3, nodes=3, spares=0, min_nodes=2, shrink_after_s=0.5) as job:
        training(job)
        with pytest.raises(DrainRefused, match="has no node node-7; it has node-0, node-1, node-2"):
            job.controller.drain("node-7", "me", "")
        job.controller.drain("here/node-1", "me", "")
        with pytest.raises(DrainRefused, match=r"without node-0 1 of 3 nodes could be used, but .* needs 2\. Resume"):
            job.controller.drain("node-0", "me", "")
        job.settle(0.5)
        leaves(job)
        life = job.controller.life
        assert life is not None
        assert life.nodes == ("node-0", "node-2")


def test_a_cluster_store_that_is_away_is_told_once_and_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with world(cluster=str(tmp_path / "file/below")) as job:
        training(job)
        job.controller.isolation.on_verdicts("node-1", BAD)
        for _ in range(3):
            job.settle(0.5)
            job.controller.isolation.close()
        (event,) = events(job, "cluster store")
        assert "EVERMESH_CLUSTER" in event.text


@pytest.mark.parametrize("mode", ["act", "advise"])
def test_a_node_that_is_lost_in_two_jobs_is_not_used_by_the_third(mode: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"isolation": {"mode": mode, "false_alarm_s": 0}, "cluster": str(tmp_path / "cluster")}
    told = []
    for _ in range(2):
        with world(**given) as job:
            training(job)
            job.agents["node-1"].die()
            job.settle(2.0)
            step(job)
            assert job.controller.state == "training"
            told.append([(event.fields["action"], event.fields["carried_out"]) for event in events(job)])
    assert told == [[], [("drain", mode == "act")]], "once is never"
    with world(**given) as job:
        training(job)
        life = job.controller.life
        assert life is not None
        assert life.nodes == (("node-0", "node-2") if mode == "act" else ("node-0", "node-1"))
        assert events(job)[0].fields["action"] == ("cordon" if mode == "act" else "drain")


def test_faults_that_are_made_on_purpose_blame_no_machine_beyond_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evermesh.launcher.controller.isolation.read_injection", lambda run: object())
    with world(**ACT) as job:
        training(job)
        job.controller.isolation.on_verdicts("node-1", BAD)
        job.settle(1.0)
        assert [event.fields["action"] for event in events(job)] == ["drain"]
        assert records(job) == []


def test_a_cordon_of_another_machine_of_that_name_does_not_count() -> None:
    said: list[tuple[Callable[[], Cordon], bool]] = [
        (lambda: Cordon(time_s=1.0, node="here/node-1", by="me", because="b"), True),
        (lambda: Cordon(time_s=1.0, node="here/node-1", by="me", because="b", until_s=2.0), False),
        (lambda: Cordon(time_s=1.0, node="elsewhere", by="me", because="b"), False),
    ]
    for make, counts in said:
        with world() as job:
            ClusterStore(Path(str(job.config.cluster))).add([make()])
            job.controller.isolation._desk._exchange()
            job.settle(1.0)
            life = job.controller.life
            assert life is not None
            assert ("node-1" not in life.nodes) is counts
            assert bool(events(job)) is counts


def life_of(*failures: Failure, lost: tuple[str, ...] = ()) -> Life:
    with world(workers=4, nodes=2) as job:
        found = Life(("node-0", "node-1"), job.config, None)
    for failure in failures:
        found.fail(failure)
    found.lost |= set(lost)
    return found


def failure(rank: int, cause: str = "died", **changes: Any) -> Failure:
    return Failure(rank=rank, time_s=float(rank), how="was killed", cause=cause, code=-9, **changes)


def test_who_is_blamed_for_a_failed_attempt() -> None:
    def blamed(*failures: Failure, lost: tuple[str, ...] = ()) -> list[tuple[str, str, float, float]]:
        return [(one.node, one.kind, one.weight, one.confidence) for one in of_failure(life_of(*failures, lost=lost))]

    assert blamed(failure(2)) == [("node-1", "process died", 1.0, 1.0)]
    assert blamed(failure(2, "froze")) == [("node-1", "rank froze", 1.0, 1.0)]
    assert blamed(failure(0), failure(2)) == [("node-0", "process died", 0.5, 1.0)]
    assert blamed(failure(2), failure(0, peer_lost=True)) == [("node-1", "process died", 1.0, 1.0)]
    assert blamed(failure(2).model_copy(update={"code": -6})) == [("node-1", "process died", 1.0, 0.4)]
    assert blamed(failure(2, "raised")) == blamed(failure(2, "refused")) == blamed(failure(2, peer_lost=True)) == []
    assert blamed(failure(0), lost=("node-1",)) == [("node-1", "node lost", 1.0, 1.0)]
    assert [part[2] for part in blamed(lost=("node-0", "node-1"))] == [0.5, 0.5]


def test_whom_findings_blame() -> None:
    life, names = life_of(), {"node-0": "node-0", "here/node-1": "node-1"}

    def blamed(**of: Any) -> list[tuple[str, float]]:
        found = of_findings([Finding(kind=kinds.SLOW_LINK, confidence=0.5, **of)], life, names)
        return [(one.node, one.weight) for one in found]

    assert blamed(node="here/node-1") == [("node-1", 1.0)]
    assert blamed(rank=3) == blamed(node="unknown", rank=3) == [("node-1", 1.0)]
    assert blamed(link=(0, 3)) == [("node-0", 0.5), ("node-1", 0.5)]
    assert blamed(link=(0, 1)) == [("node-0", 1.0)]
    assert blamed() == blamed(rank=9) == []
    unknown = Evidence(time_s=0.0, node=NodeIdentity(name="x"), kind="k")
    assert unknown.weight == unknown.confidence == 1.0
