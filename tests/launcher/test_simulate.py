"""``evermesh simulate``: sources, faults, what it prints and writes, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from evermesh.launcher.commands.app import app
from evermesh.parallelism import BatchPlan, CostModel, Layout, plan_batch
from evermesh.parallelism.errors import EvermeshError
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.simulator import Scenario, SlowRank, simulate_events

LENGTHS = (4000, 2500, 2400, 900, 900, 700, 100)
COST = CostModel(token_s=1e-5, pair_s=2e-9, micro_batch_s=1e-3, ring_step_s=1e-4, ring_token_s=3e-6)


def simulate(*arguments: str | Path) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def figures(*arguments: str | Path) -> dict[str, Any]:
    """What it says with ``--json``."""
    found = simulate(*arguments, "--json")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.txt"
    path.write_text("".join(f"{length}\n" for length in LENGTHS))
    return path


@pytest.fixture
def cost(tmp_path: Path) -> Path:
    path = tmp_path / "cost.json"
    path.write_text(COST.model_dump_json())
    return path


def test_a_list_of_lengths_is_planned_and_simulated_on_the_ranks_that_are_named(lengths: Path, cost: Path) -> None:
    layout = Layout(hdp=4, capacity=1500)
    plan = plan_batch(LENGTHS, layout, COST)
    found = figures(lengths, "--cost", cost, "--hdp", "4", "--capacity", "1500")
    assert found["makespan_s"] == found["undisturbed_s"] == pytest.approx(plan.certificate.makespan_s)
    assert found["bound_s"] == pytest.approx(plan.certificate.lower_bound_s)
    slow = figures(lengths, "--cost", cost, "--hdp", "4", "--capacity", "1500", "--slow", "1=0.5@0.01")
    scenario = Scenario(Pool.of(4), (SlowRank(1, 0.5, 0.01),))
    assert slow["makespan_s"] == simulate_events(plan, layout, COST, scenario).timeline.makespan_s > found["makespan_s"]
    assert slow["waiting_s"].keys() <= {"ring partner", "end of step"}


def test_a_plan_in_json_and_the_same_plan_of_another_system_give_the_same_figures(tmp_path: Path, cost: Path) -> None:
    plan = plan_batch(LENGTHS, Layout(hdp=4, capacity=1500), COST)
    (tmp_path / "ours.json").write_bytes(plan.to_json())
    ranks = [
        [
            {"pieces": [{"sequence": p.sequence, "tokens": p.num_tokens, "ring": p.ring} for p in mb.pieces]}
            for mb in mbs
        ]
        for mbs in plan.ranks
    ]
    (tmp_path / "theirs.json").write_text(json.dumps({"format": "evermesh-replay-1", "capacity": 1500, "ranks": ranks}))
    found = [figures(tmp_path / name, "--cost", cost) for name in ("ours.json", "theirs.json")]
    assert found[0] == found[1]
    assert found[0]["makespan_s"] == pytest.approx(plan.certificate.makespan_s)


def test_a_job_is_simulated_with_its_own_layout_and_another_number_of_ranks(job_file: Path) -> None:
    assert len(figures(job_file)["ranks"]) == 2
    assert len(figures(job_file, "--hdp", "3", "--batch", "2")["ranks"]) == 3


def test_a_pipeline_has_a_row_for_every_stage(lengths: Path) -> None:
    found = figures(lengths, "--hdp", "3", "--pp", "2")
    assert [rank["rank"] for rank in found["ranks"]][:2] == ["rank 0 pp 0", "rank 0 pp 1"]
    assert len(found["ranks"]) == 6
    assert "pipeline" in found["waiting_s"]


def test_it_says_how_long_who_waits_and_writes_trace_and_picture(lengths: Path, tmp_path: Path) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "step.png"
    found = simulate(
        lengths, "--hdp", "4", "--ranks-per-node", "2", "--slow", "1=0.5", "--trace", trace, "--png", picture
    )
    assert found.exit_code == 0, found.output
    for part in ("makespan", "bound", "when nothing goes wrong", "waiting: ", "most work: rank 1 "):
        assert part in found.output
    events = json.loads(trace.read_bytes())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"node 0", "node 1"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_lost_rank_leaves_others_waiting_and_the_step_is_repeated_without_it(lengths: Path, cost: Path) -> None:
    arguments: list[str | Path] = [lengths, "--cost", cost, "--hdp", "4", "--capacity", "1500", "--lose", "2@0.01"]
    found = figures(*arguments)
    assert found["makespan_s"] is None
    assert found["lost"] == ["rank 2"]
    assert {blocked["root"] for blocked in found["blocked"]} == {"rank 2"}
    repeated = plan_batch(LENGTHS, Layout(hdp=3, capacity=1500), COST).certificate.makespan_s
    assert found["repeated_s"] == pytest.approx(repeated)
    assert found["time_lost_s"] == pytest.approx(0.01 + repeated - found["undisturbed_s"])
    text = simulate(*arguments).output
    assert "lost: rank 2; the step cannot end" in text
    assert "repeated on the ranks that are left" in text
    alone = simulate(lengths, "--hdp", "3", "--capacity", "1400", "--lose", "2@0.0")
    assert "the ranks that are left cannot repeat the step" in alone.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slow", "1"], "--slow 1: write RANK=FACTOR"),
        (["--slow", "9=0.5"], "there is no rank 9 among 8 HDP ranks"),
        (["--slow", "1=0"], "give a positive number"),
        (["--slow-link", "1-2"], "--slow-link 1-2: write A-B=FACTOR"),
        (["--lose", "1=2"], "--lose 1=2: write RANK@SECONDS"),
        (["--tp", "4", "--ranks-per-node", "6"], "Give a multiple of 4"),
        (["--cost", "lengths.txt"], "the file: Invalid JSON"),
        (["--cost", "nowhere.json"], "nowhere.json cannot be read: No such file"),
    ],
)
def test_what_cannot_be_simulated_is_one_line_with_the_way_out(
    arguments: list[str], message: str, lengths: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lengths.parent)
    found = simulate(lengths, *arguments)
    assert isinstance(found.exception, EvermeshError)
    assert message in str(found.exception)
    assert "\n" not in str(found.exception)
    assert getattr(found.exception, "exit_code", 2) == 2


def test_a_plan_whose_degrees_the_command_line_contradicts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(plan_batch(LENGTHS, Layout(hdp=4, capacity=1500), COST).to_json())
    assert "--hdp 5, but the plan in" in str(simulate(path, "--hdp", "5").exception)
    shared = plan_batch(LENGTHS, Layout(hdp=4, capacity=1500, ep=2), COST)
    assert BatchPlan.from_json(shared.to_json()) == shared
    path.write_bytes(shared.to_json())
    assert "share experts or parameters" in str(simulate(path).exception)
    path.write_text("[]")
    assert "not a batch plan" in str(simulate(path).exception)
