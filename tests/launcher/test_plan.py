"""``evermesh plan`` for clusters that are not there: coefficients from a file, peers, reasons, what it writes and refuses."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from evermesh.launcher.commands.app import app
from evermesh.launcher.plan_picture import offload_line
from evermesh.parallelism import BatchPlan, CostModel, Layout, Pool, plan_batch, verify_plan
from evermesh.parallelism.errors import EvermeshError
from evermesh.parallelism.planner.restated import RESTATED

LENGTHS = (60_000, 31_000, 9000, 8500, 7000, *(500 + 37 * i for i in range(60)))
COST = {"token_s": 1e-5, "pair_s": 1e-9, "ring_token_s": 1e-6, "network_token_s": 5e-6, "micro_batch_s": 1e-3}
CLUSTER = ("--hdp", "16", "--tp", "4", "--capacity", "8192")


def plan(*arguments: str | Path) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture
def files(tmp_path: Path) -> tuple[str | Path, ...]:
    """Options that name lengths and coefficients."""
    (tmp_path / "lengths").write_text("".join(f"{length}\n" for length in LENGTHS))
    (tmp_path / "cost.json").write_text(json.dumps({**COST, "ranks_per_node": 8}))
    return ("--lengths", tmp_path / "lengths", "--cost", tmp_path / "cost.json")


def test_the_whole_plan_is_written_as_json_that_another_program_can_check(
    tmp_path: Path, files: tuple[str | Path, ...]
) -> None:
    found = plan(*files, *CLUSTER, "--json", tmp_path / "plan.json", "--trace", tmp_path / "trace.json")
    assert found.exit_code == 0, found.output
    document = json.loads((tmp_path / "plan.json").read_text())
    held = [0] * len(LENGTHS)
    for rank, micro_batches in enumerate(document["ranks"]):
        for micro_batch in micro_batches:
            tokens = 0
            for piece in micro_batch["pieces"]:
                assert rank in piece["ring"]
                tokens += (share := sum(stop - start for start, stop in piece["ranges"]))
                held[piece["sequence"]] += share
            assert tokens <= document["capacity"] == 8192
    assert tuple(held) == LENGTHS == tuple(document["lengths"])
    layout = Layout(hdp=16, tp=4, capacity=8192)
    ours = plan_batch(LENGTHS, layout, CostModel(**COST), pool=Pool.of(16, 2))
    assert BatchPlan.from_json((tmp_path / "plan.json").read_bytes()).certificate == ours.certificate
    verify_plan(BatchPlan.from_json((tmp_path / "plan.json").read_bytes()), LENGTHS, layout)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("name", RESTATED)
def test_a_restated_peer_plans_the_same_batch_no_better(name: str, files: tuple[str | Path, ...]) -> None:
    ours = json.loads(plan(*files, *CLUSTER, "--json", "-").stdout)
    peer = json.loads(plan(*files, *CLUSTER, "--baseline", name, "--json", "-").stdout)
    assert peer["planner"] == f"{name}, restated"
    assert peer["certificate"]["lower_bound_s"] == ours["certificate"]["lower_bound_s"]
    assert peer["certificate"]["makespan_s"] >= ours["certificate"]["makespan_s"] * 0.999


def test_it_says_why_a_sequence_got_its_ranks(files: tuple[str | Path, ...]) -> None:
    shared = plan(*files, *CLUSTER, "--why", "0").stdout
    assert "sequence 0 has 60,000 tokens; ranks hold 8,192 at a time, so it needs at least 8 ranks." in shared
    assert "of rank-seconds" in shared
    ours = plan_batch(LENGTHS, Layout(hdp=16, tp=4, capacity=8192), CostModel(**COST), pool=Pool.of(16, 2))
    whole = next(piece.sequence for mbs in ours.ranks for mb in mbs for piece in mb.pieces if len(piece.ring) == 1)
    assert "It is whole on rank" in plan(*files, *CLUSTER, "--why", str(whole)).stdout
    with pytest.raises(EvermeshError, match="there is no sequence 65; the batch has 0 to 64"):
        raise plan(*files, *CLUSTER, "--why", "65").exception or AssertionError


def test_it_says_what_is_offloaded() -> None:
    cost = CostModel(
        **COST, recompute_token_s=3e-6, offload_saves_token_s=3e-6, host_token_s=1e-6, host_products_token_s=6e-6
    )
    layout = Layout(hdp=4, capacity=32_768, activations="offload", offload="auto")
    line = offload_line(plan_batch(LENGTHS, layout, cost))
    assert line is not None
    found = re.fullmatch(
        r"offloaded: the products of (\d+)% of all tokens; of (\d+)% to (\d+)% of those of each of .*", line
    )
    assert found is not None
    mean, least, most = map(int, found.groups())
    assert 30 < least < mean < most <= 100
    assert offload_line(plan_batch(LENGTHS, Layout(hdp=4, capacity=32_768), cost)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--baseline", "best"), "--baseline best: there is none. Choose one of "),
        (("--baseline", "static", "--pp", "2"), "Take pp 1"),
        (("--ranks-per-node", "6"), "6 workers per node: 4 workers share a model"),
    ],
)
def test_wrong_options_are_refused_with_the_way_out(
    arguments: tuple[str, ...], message: str, files: tuple[str | Path, ...]
) -> None:
    with pytest.raises(EvermeshError, match=message):
        raise plan(*files, *CLUSTER, *arguments).exception or AssertionError


def test_a_network_without_nodes_is_refused(tmp_path: Path, files: tuple[str | Path, ...]) -> None:
    (tmp_path / "cost.json").write_text(json.dumps(COST))
    with pytest.raises(EvermeshError, match="network_step_s need ranks_per_node"):
        raise plan(*files, *CLUSTER).exception or AssertionError
    (tmp_path / "cost.json").write_text(json.dumps({**COST, "network_token_s": 1e-7, "ranks_per_node": 8}))
    with pytest.raises(EvermeshError, match="is less than ring_token_s"):
        raise plan(*files, *CLUSTER).exception or AssertionError
