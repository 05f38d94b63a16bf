"""``evermesh chaos``: jobs with faults, which are data, and what is reported of each. The fault matrix.

State comes back from checkpoints on disk. Losses and parameters are compared bit for bit with a run without faults.
"""

from pathlib import Path
from typing import Any

import pytest

from evermesh.fault.events import Event, read_events
from evermesh.fault.injection import AtStep, Injection, Kill, Schedule, Slow, Target, resolve
from evermesh.launcher import Run
from evermesh.launcher.chaos.record import forget_injection, read_injection, write_injection
from evermesh.launcher.chaos.report import ChaosReport, FaultReport
from evermesh.launcher.chaos.running import shape_of
from evermesh.launcher.controller.work import training_work
from evermesh.launcher.job_file import load_job
from evermesh.launcher.report.accounting import COUNTED
from evermesh.launcher.report.gathering import gather
from evermesh.launcher.report.page import page
from evermesh.runtime.telemetry import read_telemetry
from tests.launcher.conftest import write_job
from tests.launcher.jobs import launched, with_faults
from tests.launcher.test_cli import evermesh

pytestmark = pytest.mark.timeout(600)  # two whole jobs in the fixture
EVERY_4 = ("nodes=2", "train.checkpoint.every=4", "restarts=20")


def kill(target: str, step: int, phase: str | None = None, **more: Any) -> dict[str, Any]:
    at = {"step": step} if phase is None else {"step": step, "phase": phase}
    return {"kind": "kill", "target": target, "at": at, **more}


@pytest.fixture(scope="module")
def survived(job_file_of_module: Path) -> ChaosReport:
    """One job that all of this happens to, and one that it does not happen to."""
    faults = [
        {
            "kind": "delay",
            "target": "node 1",
            "at": {"step": 3},
            "seconds": 0.1,
            "lost": 0.2,
            "again_s": 0.2,
            "for_s": 3,
        },
        kill("rank 1", 6, "backward"),
        {"kind": "raise", "target": "rank 0", "at": {"step": 11, "phase": "all-reduce"}},
        {"kind": "slow", "target": "rank 1", "at": {"step": 13}, "factor": 2, "sleep_s": 0.3, "steps": 3},
        {"kind": "stop", "target": "rank any", "at": {"step": 18}, "continue_after_s": 0.4},
        {"kind": "slow", "target": "rank 0", "at": {"step": 20}, "sleep_s": 0.05, "steps": 17},  # time to look
        kill("agent 1", 22),
        kill("controller", 26),
        kill("rank all", 32, "copy"),
    ]
    return with_faults(job_file_of_module, "train.steps=36", *EVERY_4, faults=faults, compared=True)


def one(report: ChaosReport, beginning: str) -> FaultReport:
    (found,) = [fault for fault in report.faults if fault.fault.startswith(beginning)]
    return found


def test_a_job_survives_many_kinds_of_faults_with_the_bits_of_a_clean_run_and_leaves_nothing_behind(
    survived: ChaosReport,
) -> None:
    assert survived.passed, survived.problems
    assert survived.comparison is not None
    assert survived.comparison.verdict == "bit-equal"
    assert survived.parameters == survived.comparison.parameters
    assert (survived.orphans, survived.leaked_memory) == ((), ())
    assert survived.attempts == 5
    assert survived.steps == 36
    assert survived.steps_lost == sum(fault.steps_lost for fault in survived.faults[:-1])  # the last two are one
    assert 0 < survived.goodput < 1


def test_f1_a_killed_worker_is_named_and_the_steps_since_the_checkpoint_are_trained_again(
    survived: ChaosReport,
) -> None:
    killed = one(survived, "kill rank 1 at step 6")
    assert killed.detected_after_s is not None
    assert killed.training_after_s is not None
    assert 0 < killed.detected_after_s < killed.training_after_s
    assert killed.cause == "rank 1 was killed by signal 9 (SIGKILL)"
    assert (killed.outcome, killed.step, killed.steps_lost) == ("restarted", 6, 1)
    events = list(read_events(Path(survived.run) / "events.jsonl"))
    kinds = [event.kind for event in events]
    assert kinds[0] == "faults given"
    assert kinds.index("injected") < kinds.index("failed") < kinds.index("restarted") < kinds.index("resumed")


def test_a_rank_that_raises_is_named_with_what_it_raised(survived: ChaosReport) -> None:
    raised = one(survived, "raise rank 0")
    assert (raised.cause, raised.outcome) == ("rank 0 failed: InjectedFault: injected", "restarted")


def test_f29_a_slow_rank_and_f7_one_that_is_stopped_for_a_moment_end_no_attempt(survived: ChaosReport) -> None:
    for beginning in ("slow rank 1", "slow rank 0", "stop rank"):
        fault = one(survived, beginning)
        assert (fault.outcome, fault.detected_after_s) == ("survived", None)
    step_s = {report.step: report.step_s for report in read_telemetry(Path(survived.run) / "telemetry.jsonl")}
    assert min(step_s[step] for step in (13, 14, 15)) > 0.3
    assert step_s[18] > 0.4


def test_a_node_whose_way_to_the_controller_is_slow_and_loses_a_part_is_not_taken_for_lost(
    survived: ChaosReport,
) -> None:
    fault = one(survived, "delay node 1")
    assert fault.outcome == "survived"
    lost = [event for event in read_events(Path(survived.run) / "events.jsonl") if event.kind == "node lost"]
    assert all("node-1" in event.text for event in lost)
    assert len(lost) <= 1, "its agent is killed later"


def test_f5_an_agent_that_is_killed_is_found_lost_and_f22_a_controller_is_replaced_without_a_restart(
    survived: ChaosReport,
) -> None:
    agent, controller = one(survived, "kill agent 1"), one(survived, "kill controller")
    assert (agent.cause, agent.outcome) == ("lost node-1", "restarted")
    assert controller.outcome == "survived"
    assert controller.cause is not None
    assert controller.cause.endswith("took over")
    assert controller.detected_after_s is not None


def test_the_report_of_the_run_tells_every_restart_and_accounts_for_every_second(survived: ChaosReport) -> None:
    told, material = gather(Run(Path(survived.run)), price=2.0, peak_flops=1e12)
    assert (told.state, told.attempts, len(told.incidents)) == ("finished", 5, 4)
    assert sum(told.parts.values()) == pytest.approx(told.wall_s, rel=1e-6)
    assert told.parts[COUNTED] == pytest.approx(told.goodput * told.wall_s)
    assert told.training.trained_again == survived.steps_lost
    assert [incident.steps_lost for incident in told.incidents] == [fault.steps_lost for fault in _ended(survived)]
    assert [incident.cause for incident in told.incidents] == [fault.cause for fault in _ended(survived)]
    assert all(incident.outcome == "trains again" for incident in told.incidents)
    assert all("injected" in {moment.kind for moment in incident.story} for incident in told.incidents)
    assert all("start-up" in {moment.kind for moment in incident.story} for incident in told.incidents)
    assert told.training.flops_per_s_and_worker > 0
    assert told.cost.price == pytest.approx(told.cost.worker_hours * 2)
    assert page(told, material).count("<svg") == 2


def _ended(report: ChaosReport) -> list[FaultReport]:
    """The faults that ended an attempt, one for each."""
    found = {(fault.cause, fault.step): fault for fault in report.faults if fault.outcome == "restarted"}
    return list(found.values())


def test_f26_all_workers_killed_at_once_are_one_restart(survived: ChaosReport) -> None:
    killed = [fault for fault in survived.faults if fault.fault.endswith("step 32, copy")]
    assert [fault.outcome for fault in killed] == ["restarted", "restarted"]
    assert killed[0].cause == killed[1].cause


def test_f7_a_rank_that_hangs_is_found_from_outside_with_default_settings(job_file: Path) -> None:
    faults: list[dict[str, Any]] = [
        {"kind": "hang", "target": "rank 1", "at": {"step": 5, "phase": "backward"}},
        {"kind": "hang", "target": "rank 0", "at": {"step": 11, "phase": "all-reduce"}, "holds_gil": True},
    ]
    report = with_faults(job_file, "train.steps=16", *EVERY_4, faults=faults)
    assert report.passed, report.problems
    assert report.attempts == 3
    told = [event for event in _told(report) if event.kind == "stacks"]
    for rank, fault, event in zip((1, 0), report.faults, told, strict=True):
        assert fault.outcome == "restarted"
        assert fault.cause is not None
        assert f" hangs in step {fault.step}" in fault.cause
        assert ": no rank has computed anything for " in fault.cause
        assert fault.training_after_s is not None
        assert fault.training_after_s < 30  # 5 on an idle machine
        # whoever waits for the rank in a ring may be named beside it; what they were doing leaves no doubt
        assert event.text.splitlines()[1].startswith(f"  rank {rank} was in hook.py:")
        assert event.fields["waiting"] == [1 - rank]
    assert str(report.faults[1].cause).startswith("rank 0 hangs in step 11: ")
    found = [fault for fault in report.faults if fault.found_after_s is not None]
    assert found, "the records say it before the ranks are ended, where they are not kept from it by other processes"
    assert all("hang" in str(fault.finding) or "rank" in str(fault.finding) for fault in found)


@pytest.fixture(scope="module")
def remembered(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ChaosReport:
    """A job that goes on from memory alone, and whose keepers and snapshots this happens to."""
    faults: list[dict[str, Any]] = [
        {"kind": "slow", "target": "rank 0", "at": {"step": 10}, "sleep_s": 0.05, "steps": 150},  # time to look
        kill("keeper 0", 12),
        {"kind": "stop", "target": "keeper 1", "at": {"step": 30}},
        {"kind": "flip", "what": "snapshot", "target": "rank 1", "at": {"step": 130}},
        kill("rank 1", 131),
        {"kind": "flip", "what": "header", "element": 70, "target": "rank 0", "at": {"step": 146}},
        kill("rank 0", 147),
    ]
    more = ("nodes=2", "train.checkpoint.every=null", "train.snapshot.every=4", "restarts=20")
    job_file = write_job(corpus, tmp_path_factory.mktemp("remembered"))
    return with_faults(job_file, "train.steps=160", *more, faults=faults, compared=True)


def test_a_job_whose_keepers_and_snapshots_are_hit_has_the_bits_of_a_clean_run(remembered: ChaosReport) -> None:
    assert remembered.passed, remembered.problems
    assert remembered.comparison is not None
    assert remembered.comparison.verdict == "bit-equal"
    assert remembered.attempts == 3
    resumed = [event for event in _told(remembered) if event.kind == "resumed"]
    assert [event.fields["source"] for event in resumed] == ["memory"] * 2


def test_f6_a_keeper_that_was_killed_or_is_stopped_is_replaced_while_training_goes_on(remembered: ChaosReport) -> None:
    killed, stopped = one(remembered, "kill keeper 0"), one(remembered, "stop keeper 1")
    assert (killed.outcome, stopped.outcome) == ("survived", "survived")
    assert killed.cause == "node-0: the keeper of snapshots: it had died; another one is started"
    assert stopped.cause is not None
    assert stopped.cause.startswith("node-1: the keeper of snapshots: it was stopped for 2.")
    assert stopped.detected_after_s is not None
    assert stopped.detected_after_s < 30  # 3.5 on an idle machine
    (lost,) = [event for event in _told(remembered) if event.kind == "keeper lost" and "node-1" in event.text]
    later = [event for event in _told(remembered) if event.kind == "resumed" and event.time_s > lost.time_s]
    assert later[0].step is not None
    assert lost.step is not None
    assert later[0].step > lost.step, "the next keeper makes snapshots too"


def test_f19_f21_a_snapshot_with_a_flipped_byte_is_rebuilt_from_the_other_node_or_the_one_before_is_used(
    remembered: ChaosReport,
) -> None:
    in_data, in_header = one(remembered, "flip rank 1"), one(remembered, "flip rank 0")
    assert in_data.cause is not None
    by_whom = (
        "the checksum is wrong",
        "memory of a snapshot has changed",
    )  # a rank that restores, the scrubber before it
    assert any(text in in_data.cause for text in by_whom)
    resumed = [event.step for event in _told(remembered) if event.kind == "resumed"]
    rebuilt = [event.step for event in _told(remembered) if event.kind == "snapshot rebuilt"]
    for told, step in zip((in_data, in_header), resumed, strict=True):
        assert told.injected is not None
        flipped = int(told.injected.rpartition(" ")[2])
        assert step == (flipped if flipped in rebuilt else flipped - 4)


def _told(report: ChaosReport) -> list[Event]:
    return list(read_events(Path(report.run) / "events.jsonl"))


def test_f3_an_exception_before_the_first_step_is_not_retried_and_its_traceback_comes_last(job_file: Path) -> None:
    faults = job_file.with_name("faults.yaml")
    faults.write_text("{expect_exit: 1, faults: [{kind: raise, target: rank 1, at: {step: 1, phase: backward}}]}")
    with launched(job_file, command=("chaos", "--json", "--schedule", str(faults))) as job:
        code, stdout, stderr = job.end()
    report = ChaosReport.model_validate_json(stdout)
    assert (code, report.problems, report.exit_code, report.attempts) == (0, (), 1, 1)
    assert report.faults[0].outcome == "ended the job"
    assert "No other attempt: it was raised before the first step" in stderr
    assert "Going on" not in stderr
    assert (
        stderr[stderr.rindex("Traceback (most recent call last)") :]
        .splitlines()[-1]
        .endswith("InjectedFault: injected")
    )


def test_f4_three_attempts_without_progress_end_the_run_with_93(job_file: Path) -> None:
    faults = [kill("rank 1", 3, times=3)]
    nothing = ("train.checkpoint.every=null", "train.snapshot=off")
    report = with_faults(job_file, *nothing, "restarts=9", faults=faults, expect_exit=93)
    assert report.passed, report.problems
    assert (report.exit_code, report.attempts) == (93, 3)
    assert [fault.outcome for fault in report.faults] == ["restarted", "restarted", "ended the job"]


def injection_for(job_file: Path) -> Injection:
    schedule = Schedule(faults=(Kill(target=Target(of="rank", which=0), at=AtStep(step=1)),))
    return resolve(schedule, shape_of(load_job(job_file)))


def test_a_slow_node_slows_the_ranks_that_are_placed_there(job_file: Path) -> None:
    config = load_job(job_file, ["nodes=2"])
    run = Run.create(config)
    slow = Slow(target=Target(of="node", which=1), at=AtStep(step=2), sleep_s=0.1)
    write_injection(run, resolve(Schedule(faults=(slow,)), shape_of(config)))
    placed = {"node-0": (0, 1), "node-1": (2, 3)}
    for ranks_of, victims in ((placed.__getitem__, ["rank 2", "rank 3"]), (lambda node: (), [])):
        arguments = training_work(run, config, 0.0, config.train.layout, (), ranks_of).arguments
        assert [shot["victim"] for shot in arguments["faults"]] == victims


def test_only_a_run_that_was_given_faults_hands_them_to_its_workers(job_file: Path) -> None:
    config = load_job(job_file)
    run, other = Run.create(config), Run.create(config)
    write_injection(run, injection_for(job_file))
    assert read_injection(run) == injection_for(job_file)
    layout = config.train.layout
    assert len(training_work(run, config, 0.0, layout).arguments["faults"]) == 1
    assert "faults" not in training_work(other, config, 0.0, layout).arguments
    forget_injection(run)
    assert "faults" not in training_work(run, config, 0.0, layout).arguments


def test_a_schedule_that_does_not_fit_is_refused_with_its_lines_before_anything_starts(job_file: Path) -> None:
    faults = job_file.with_name("faults.yaml")
    faults.write_text(
        "faults:\n- {kind: kill, target: rank 7, at: {step: 2}}\n- kind: kill\n  at:\n    step: 900\n  target: rank 0\n"
    )
    found = evermesh("chaos", job_file, "--schedule", faults)
    assert found.returncode == 2
    assert found.stderr == (
        f"error: {faults}:2: faults.0.target: rank 7 is none of the 2 ranks of this job (0 to 1).\n"
        f"{faults}:5: faults.1.at.step: step 900, but the run ends with step 6.\n"
    )
    faults.write_text("faults:\n- kind: kill\n  at: {step: 1}\n  signal: SIGNO\n")
    found = evermesh("chaos", job_file, "--schedule", faults)
    assert (
        found.stderr
        == f"error: {faults}:4: faults.0.signal: 'SIGNO' is no signal of this system; write SIGKILL or 9.\n"
    )
    assert not (job_file.parent / "runs").exists()


def test_drawn_faults_that_do_not_fit_are_refused(job_file: Path) -> None:
    found = evermesh("chaos", job_file, "--faults", "9")
    assert found.returncode == 2
    assert (
        "9 faults, each with 2 steps (checkpoint.every) of its own and as many up to the next, need 34" in found.stderr
    )
    assert "'kill=x' is not KIND or KIND=RATE" in evermesh("chaos", job_file, "--kinds", "kill=x").stderr
