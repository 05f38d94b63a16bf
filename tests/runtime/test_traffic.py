"""Real training runs: what the tap saw against the formula of every step."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from evermesh.parallelism import BatchPlan, ByteLedger, CollectiveRecord, CostModel, Traffic
from evermesh.parallelism.experts import Placement
from evermesh.parallelism.fabric.exchanges import SMALL, Collective, Exchange, plan_exchanges
from evermesh.parallelism.traffic import Choices, TrainedModel
from evermesh.runtime import StepReport, TrainConfig
from evermesh.runtime.memory import step_offloaded_bytes
from evermesh.runtime.micro_batch import LocalBatch
from evermesh.runtime.process_group import nodes_of_ranks
from evermesh.runtime.traffic import step_traffic, trained_model
from evermesh.runtime.trainer import Trainer
from tests.cluster import run_ranks

STEPS = 3
BY_DOCUMENT = {"moe": {"experts": 4, "ffn": 16, "balancing": {"kind": "document_loss"}}}
SHARED = {"experts": 4, "ffn": 16, "shared_ffn": 16, "first_dense_layers": 1, "balancing": {"kind": "bias"}}
EXPERTS = {"moe": SHARED}


def _config(
    corpus: Path,
    dtype: str = "float32",
    model: dict[str, Any] | None = None,
    optimizer: str = "adamw",
    compiled: dict[str, Any] | None = None,
    **layout: Any,
) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48} | (model or {}),
            "data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 512, "batch_tokens": 1500},
            "layout": {"capacity": 520 // layout["hdp"]} | layout,
            "checkpoint": {"every": 2, "asynchronous": False},
            "optimizer": {"kind": optimizer},
            "compile": compiled,
            "evaluation": {"every": 2, "tokens": 700},
            "dtype": dtype,
            "steps": STEPS,
        }
    )


class Seen(NamedTuple):
    """A run as one rank saw it, by step."""

    model: TrainedModel
    plans: list[BatchPlan]
    reports: list[StepReport]
    """On rank 0."""
    routing: list[list[dict[int, list[int]]]]
    """By micro-batch, by layer: how many of this rank's tokens chose each expert."""
    placements: list[dict[int, Placement]]
    """By layer."""


def _seen(rank: int, workers: int, config: TrainConfig, ranks_per_node: int | None, bad_step: int | None) -> Seen:
    """The loss of ``bad_step`` is not finite."""
    if ranks_per_node is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)
    reports: list[StepReport] = []
    plans: list[BatchPlan] = []
    routing: list[list[dict[int, list[int]]]] = []
    placements: list[dict[int, Placement]] = []
    trainer = Trainer(config, report=reports.append)
    step, run = trainer.train_step, trainer.runner.accumulate

    def train_step(batch: Any) -> Any:
        plans.append(batch.plan)
        return step(batch)

    def accumulate(batch: LocalBatch) -> Any:
        loss, contexts = run(batch)
        routing.append([{layer: load.tolist() for layer, load in context.loads.items()} for context in contexts])
        placements.append(trainer.experts.placements)
        return (loss * float("inf") if trainer.progress.step == bad_step else loss), contexts

    trainer.train_step, trainer.runner.accumulate = train_step, accumulate  # type: ignore[method-assign]
    trainer.fit()
    model = trained_model(config, trainer.corpora[0].vocabulary, trainer.built.stages, trainer.built.held)
    return Seen(model, plans, reports, routing, placements)


def _checked(
    config: TrainConfig, ranks_per_node: int | None = None, bad_step: int | None = None
) -> Iterator[tuple[BatchPlan, StepReport]]:
    """Plan and report of every step, after its ledger was found equal to the formula."""
    workers = config.layout.world_size
    of_ranks = run_ranks(workers, _seen, config, ranks_per_node, bad_step)
    nodes = [rank // (ranks_per_node or workers) for rank in range(workers)]
    first = of_ranks[0]
    assert len(first.plans) == len(first.reports) == STEPS
    for step, (plan, report) in enumerate(zip(first.plans, first.reports, strict=True)):
        choices = Choices(
            [of_rank.routing[step] for of_rank in of_ranks], [of_rank.placements[step] for of_rank in of_ranks]
        )
        assert report.committed == (report.step != bad_step)
        size = getattr(torch, config.dtype).itemsize
        assert report.offloaded_bytes == step_offloaded_bytes(plan, config.layout, config.model, size)
        assert report.traffic == step_traffic(plan, first.model, nodes, committed=report.committed, choices=choices)
        if report.committed:
            _check_network(report.traffic, plan_exchanges(plan, first.model, nodes, choices), nodes)
        yield plan, report


def _check_network(traffic: Sequence[Traffic], exchanges: Sequence[Exchange], nodes: Sequence[int]) -> None:
    """What was counted between nodes is what paths are planned for, to the byte."""
    counted, planned = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
    for part in traffic:
        if part.tier == "network" and part.call_site not in SMALL:
            counted[part.call_site, part.operation, part.axis] += part.wire_bytes
    for one in exchanges:
        key = one.call_site, one.operation, one.axis
        if isinstance(one, Collective):
            around = [*one.ranks[1:], one.ranks[0]]
            hops = enumerate(zip(one.ranks, around, strict=True))
            planned[key] += round(sum(one.wire_bytes(at) for at, (a, b) in hops if nodes[a] != nodes[b]))
        else:
            planned[key] += round(one.num_bytes.sum())
    assert +planned == +counted


@pytest.mark.parametrize(
    ("workers", "ranks_per_node", "dtype", "activations", "bad_step"),
    [
        (1, None, "float32", "keep", None),
        (2, None, "float64", "keep", 2),
        (3, None, "bfloat16", "keep", None),
        (4, None, "float32", "recompute", None),
        (4, 2, "float32", "keep", None),
        (3, None, "bfloat16", "offload", 2),
    ],
)
def test_the_ledger_of_every_step_equals_the_formula(
    workers: int, ranks_per_node: int | None, dtype: str, activations: str, bad_step: int | None, corpus: Path
) -> None:
    config = _config(corpus, dtype, hdp=workers, activations=activations)
    tiers = set() if workers == 1 else {"node"} if ranks_per_node is None else {"node", "network"}
    reports = [report for _, report in _checked(config, ranks_per_node, bad_step)]
    assert workers == 1 or any(max(report.plan.ring_sizes) == workers for report in reports), "no ring of all ranks"
    for report in reports:
        assert {part.tier for part in report.traffic} == tiers
        assert StepReport.from_json(report.to_json()) == report


def test_fractions_that_the_planner_chooses_change_no_loss_and_move_what_the_formula_says(corpus: Path) -> None:
    """The plan of every step has fractions of its own; the oracle is one process that keeps everything."""
    cost = CostModel(
        token_s=1e-5,
        pair_s=2e-7,
        recompute_token_s=3e-6,
        offload_saves_token_s=3e-6,
        host_token_s=1e-6,
        host_products_token_s=1.5e-5,
    )
    config = _config(corpus, "float64", hdp=3, activations="offload", offload="auto")
    steps = list(_checked(config.model_copy(update={"cost": cost})))
    alone = [report.loss for _, report in _checked(_config(corpus, "float64", hdp=1))]
    assert [report.loss for _, report in steps] == pytest.approx(alone, rel=1e-9)
    for plan, report in steps:
        chosen = {micro_batch.offload for of_rank in plan.ranks for micro_batch in of_rank}
        assert len(chosen) > 2
        assert report.offloaded_bytes > 0


@pytest.mark.parametrize(
    ("workers", "tp", "ranks_per_node", "dtype", "activations"),
    [(2, 2, 1, "float64", "keep"), (4, 2, 2, "bfloat16", "recompute"), (2, 2, None, "float32", "offload")],
)
def test_the_ledger_equals_the_formula_where_ranks_share_a_model(
    workers: int, tp: int, ranks_per_node: int | None, dtype: str, activations: str, odd_corpus: Path
) -> None:
    config = _config(odd_corpus, dtype, hdp=workers // tp, tp=tp, activations=activations)
    steps = list(_checked(config, ranks_per_node, bad_step=2))
    micro_batches = [mb for plan, _ in steps for of_rank in plan.ranks for mb in of_rank]
    assert any(mb.num_tokens % tp for mb in micro_batches), "no micro-batch was padded"
    for _, report in steps:
        axes = {(part.axis, part.tier) for part in report.traffic if part.axis in ("hdp", "tp")}
        across = "network" if ranks_per_node == 1 else "node"
        assert axes == {("tp", across), *([] if workers == tp else [("hdp", "network")])}


@pytest.mark.parametrize(
    ("moe", "layout"),
    [
        (None, {"hdp": 2, "tp_chunks": 3, "activations": "recompute"}),
        (SHARED | {"balancing": {"kind": "document_loss"}}, {"hdp": 1, "activations": "recompute"}),
        (SHARED | {"shared_gate": True}, {"hdp": 1, "tp_chunks": 2, "activations": ["keep", "recompute"]}),
        pytest.param(
            SHARED, {"hdp": 2, "tp_chunks": 3, "activations": "recompute", "ep": 2, "etp": 2}, marks=pytest.mark.parity
        ),
        pytest.param(
            SHARED | {"balancing": {"kind": "document_loss"}},
            {"hdp": 1, "pp": 2, "tp_chunks": 3, "activations": "recompute", "schedule": "zero-bubble"},
            marks=pytest.mark.parity,
        ),
    ],
)
def test_the_ledger_equals_the_formula_where_tokens_travel_in_chunks(
    moe: dict[str, Any] | None, layout: dict[str, Any], odd_corpus: Path
) -> None:
    """And where a block that is computed again needs what its shared experts gave."""
    config = _config(odd_corpus, "float64", {"moe": moe}, tp=2, **layout)
    for _, report in _checked(config):
        calls = {part.call_site: part.calls for part in report.traffic if part.operation == "reduce_scatter"}
        assert calls["tensor forward"] > calls["tensor backward"], "nothing was scattered again"


@pytest.mark.parity
@pytest.mark.parametrize("layout", [{"pp": 2, "hdp": 1}, {"tp": 2, "hdp": 1}])
def test_the_ledger_counts_the_padding_of_compiled_blocks(layout: dict[str, Any], odd_corpus: Path) -> None:
    config = _config(odd_corpus, "float64", {"layers": 2}, compiled={"buckets": [520]}, **layout)
    assert all(report.padding_tokens > 0 for _, report in _checked(config))


@pytest.mark.parametrize(
    ("model", "layout", "ranks_per_node", "axes"),
    [
        pytest.param(
            {"tied_embeddings": True}, {"pp": 2, "hdp": 2, "tp": 2}, 4, {"pp", "hdp", "tp"}, marks=pytest.mark.parity
        ),
        pytest.param(
            BY_DOCUMENT,
            {"hdp": 2, "tp": 2, "ep": 4, "activations": "recompute"},
            2,
            {"hdp", "tp", "ep"},
            marks=pytest.mark.parity,
        ),
        (EXPERTS, {"pp": 2, "hdp": 4, "ep": 2, "etp": 2, "hot_experts": 1}, 2, {"pp", "hdp", "ep", "etp"}),
        (
            EXPERTS,
            {"hdp": 2, "tp": 2, "ep": 2, "activations": ["recompute", "offload", "keep", "offload"], "offload": 0.4},
            2,
            {"hdp", "tp", "ep", "edp"},
        ),
        pytest.param(
            EXPERTS | {"tied_embeddings": True},
            {
                "pp": 2,
                "hdp": 2,
                "tp": 2,
                "ep": 2,
                "activations": "recompute",
                "schedule": "zero-bubble",
                "virtual_stages": 2,
            },
            4,
            {"pp", "hdp", "tp", "ep", "edp"},
            marks=pytest.mark.parity,
        ),
    ],
)
def test_the_ledger_equals_the_formula_on_pipelines_and_where_ranks_share_experts(
    model: dict[str, Any], layout: dict[str, Any], ranks_per_node: int, axes: set[str], odd_corpus: Path
) -> None:
    config = _config(odd_corpus, "float64", {"layers": 4} | model, optimizer="lamb", **layout)
    for _, report in _checked(config, ranks_per_node, bad_step=2):
        assert {part.axis for part in report.traffic} - {"readers"} == {*axes, "world", "control"}


@pytest.mark.parametrize(
    ("model", "layout", "sharding", "ranks_per_node"),
    [
        ({"tied_embeddings": True}, {"hdp": 4}, {"parameters": 2, "gradients": 4, "keep_for": "micro_batch"}, 2),
        pytest.param(
            {},
            {"hdp": 4, "activations": "recompute"},
            {"parameters": 2, "gradients": 2, "states": 2},
            2,
            marks=pytest.mark.parity,
        ),
        pytest.param(
            {"tied_embeddings": True},
            {"pp": 2, "hdp": 2, "tp": 2},
            {"parameters": "all", "gradients": "all", "keep_for": "micro_batch"},
            4,
            marks=pytest.mark.parity,
        ),
        (
            EXPERTS,
            {"hdp": 8, "ep": 2, "etp": 2, "hot_experts": 1, "activations": "recompute"},
            {"parameters": "all", "gradients": "all", "keep_for": "micro_batch"},
            4,
        ),
        pytest.param(
            EXPERTS | {"tied_embeddings": True},
            {"pp": 2, "hdp": 4, "ep": 2, "schedule": "zero-bubble-v", "virtual_stages": 2, "hot_experts": 1},
            {"parameters": 2, "gradients": "all", "keep_for": "micro_batch"},
            4,
            marks=pytest.mark.parity,
        ),
    ],
)
def test_the_ledger_equals_the_formula_where_ranks_divide_what_they_train(
    model: dict[str, Any], layout: dict[str, Any], sharding: dict[str, Any], ranks_per_node: int, odd_corpus: Path
) -> None:
    values = {**layout, "sharding": sharding}
    config = _config(odd_corpus, "float64", {"layers": 4} | model, optimizer="lamb", **values)
    for _, report in _checked(config, ranks_per_node, bad_step=2):
        assert any(part.call_site == "sharded parameters" for part in report.traffic)


def _records(rank: int, workers: int, config: TrainConfig, directory: Path) -> list[CollectiveRecord]:
    """Every record of a run and of one that resumes it."""
    records: list[CollectiveRecord] = []
    for stop_at in (2, None):
        trainer = Trainer(config.model_copy(update={"stop_at": stop_at}), directory=directory, resume=stop_at is None)
        with trainer.groups.listen(records.append):
            trainer.fit()
    return records


@pytest.fixture(scope="module")
def records(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[CollectiveRecord]]:
    """Records of three ranks that stop after step 2 and resume up to step 3."""
    config = _config(corpus, hdp=3).model_copy(update={"evaluation": None})
    return run_ranks(3, _records, config, tmp_path_factory.mktemp("records"))


def test_records_of_every_group_tell_their_step_and_phase(records: list[list[CollectiveRecord]]) -> None:
    for of_rank in records:
        moments = {axis: {(r.step, r.phase) for r in of_rank if r.axis == axis} for axis in ("hdp", "control", "host")}
        assert moments["hdp"] == moments["control"] == {(1, "train"), (2, "train"), (3, "train")}
        assert moments["host"] == {(2, "checkpoint"), (3, "checkpoint")}


def test_ranks_agree_on_every_collective_and_its_step(records: list[list[CollectiveRecord]]) -> None:
    def collectives(of_rank: list[CollectiveRecord]) -> list[tuple[Any, ...]]:
        return sorted((r.group, r.step, r.phase, r.operation, r.call_site) for r in of_rank if not r.peers)

    assert collectives(records[0]) == collectives(records[1]) == collectives(records[2])


def test_a_checkpoint_sends_a_few_numbers_whatever_the_size_of_the_state(records: list[list[CollectiveRecord]]) -> None:
    """The digest of the parameters at the end of a run is sent over the same group."""
    ledger = ByteLedger()
    for of_rank in records:
        for record in of_rank:
            ledger(record)
    # prepare, write, manifest, commit: after each, did anyone fail? Before them a name for this save, and its length
    assert ledger.take_step(2, "checkpoint") == (
        Traffic("checkpoint", "all_reduce", "host", "node", 4 * 3 * 8, 4 * 2 * (3 - 1) * 8, 4 * 3),
        Traffic("checkpoint", "broadcast", "host", "node", 2 * 3 * 8, 2 * (3 - 1) * 8, 2 * 3),
        Traffic("digest", "all_gather", "host", "node", 3 * 16, 3 * (3 - 1) * 16, 3),
    )


def test_nodes_come_from_the_environment() -> None:
    assert run_ranks(4, _nodes) == [[(0, 0, 0, 0), (0, 0, 1, 1), (0, 0, 0, 1)]] * 4


def _nodes(rank: int, workers: int) -> list[tuple[int, ...]]:
    found = [nodes_of_ranks()]
    for ranks_per_node in ("2", "3"):
        os.environ["LOCAL_WORLD_SIZE"] = ranks_per_node
        found.append(nodes_of_ranks())
    return found
