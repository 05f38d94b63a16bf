"""Real training runs: what the tap saw against the formula of every step."""

import os
from pathlib import Path
from typing import Any

import pytest

from evermesh.parallelism import BatchPlan, ByteLedger, CollectiveRecord, Traffic
from evermesh.parallelism.traffic import TrainedModel
from evermesh.runtime import StepReport, TrainConfig
from evermesh.runtime.micro_batch import LocalBatch
from evermesh.runtime.process_group import nodes_of_ranks
from evermesh.runtime.traffic import step_traffic
from evermesh.runtime.trainer import Trainer
from tests.cluster import run_ranks

STEPS = 3


def _config(corpus: Path, workers: int, dtype: str = "float32", recompute: str = "none", tp: int = 1) -> TrainConfig:
    hdp = workers // tp
    return TrainConfig.model_validate(
        {
            "model": {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48},
            "data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 512, "batch_tokens": 1500},
            "layout": {"capacity": 520 // hdp, "hdp": hdp, "tp": tp, "recompute": recompute},
            "checkpoint": {"every": 2},
            "dtype": dtype,
            "steps": STEPS,
        }
    )


def _traffic(
    rank: int, workers: int, config: TrainConfig, ranks_per_node: int | None, bad_step: int | None
) -> tuple[TrainedModel, list[tuple[bytes, StepReport]]]:
    """Plan and report of every step on rank 0; the loss of ``bad_step`` is not finite."""
    if ranks_per_node is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)
    reports: list[StepReport] = []
    plans: list[bytes] = []
    trainer = Trainer(config, report=reports.append)
    step, run = trainer.train_step, trainer.runner.accumulate

    def train_step(batch: Any) -> Any:
        plans.append(batch.plan.to_json())
        return step(batch)

    def accumulate(batch: LocalBatch) -> Any:
        loss, contexts = run(batch)
        return (loss * float("inf") if trainer.progress.step == bad_step else loss), contexts

    trainer.train_step, trainer.runner.accumulate = train_step, accumulate  # type: ignore[method-assign]
    trainer.fit()
    shape = config.model.shape(trainer.corpora[0].vocabulary)
    flat = trainer.built.sets[0].flat
    replicated = flat.gradients[flat.replicated].numel()
    model = TrainedModel(shape, flat.num_elements, flat.values.element_size(), config.layout.tp, replicated)
    return model, list(zip(plans, reports, strict=False))


@pytest.mark.parametrize(
    ("workers", "ranks_per_node", "dtype", "recompute", "bad_step"),
    [
        (1, None, "float32", "none", None),
        (2, None, "float64", "none", 2),
        (3, None, "bfloat16", "none", None),
        (4, None, "float32", "block", None),
        (4, 2, "float32", "none", None),
    ],
)
def test_the_ledger_of_every_step_equals_the_formula(
    workers: int, ranks_per_node: int | None, dtype: str, recompute: str, bad_step: int | None, corpus: Path
) -> None:
    config = _config(corpus, workers, dtype, recompute)
    model, steps = run_ranks(workers, _traffic, config, ranks_per_node, bad_step)[0]
    nodes = [rank // (ranks_per_node or workers) for rank in range(workers)]
    tiers = set() if workers == 1 else {"node"} if ranks_per_node is None else {"node", "network"}
    assert len(steps) == STEPS
    assert workers == 1 or any(max(report.plan.ring_sizes) == workers for _, report in steps), "no ring of all ranks"
    for plan, report in steps:
        assert report.committed == (report.step != bad_step)
        formula = step_traffic(BatchPlan.from_json(plan), model, nodes, committed=report.committed)
        assert report.traffic == formula
        assert {part.tier for part in report.traffic} == tiers
        assert StepReport.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("workers", "tp", "ranks_per_node", "dtype", "recompute"),
    [(2, 2, 1, "float64", "none"), (4, 2, 2, "bfloat16", "block")],
)
def test_the_ledger_equals_the_formula_where_ranks_share_a_model(
    workers: int, tp: int, ranks_per_node: int | None, dtype: str, recompute: str, odd_corpus: Path
) -> None:
    config = _config(odd_corpus, workers, dtype, recompute, tp)
    model, steps = run_ranks(workers, _traffic, config, ranks_per_node, 2)[0]
    nodes = [rank // (ranks_per_node or workers) for rank in range(workers)]
    assert len(steps) == STEPS
    padded = [
        micro_batch.num_tokens % tp
        for plan, _ in steps
        for micro_batches in BatchPlan.from_json(plan).ranks
        for micro_batch in micro_batches
    ]
    assert any(padded), "no micro-batch was padded"
    for plan, report in steps:
        formula = step_traffic(BatchPlan.from_json(plan), model, nodes, committed=report.committed)
        assert report.traffic == formula
        axes = {(part.axis, part.tier) for part in report.traffic if part.axis in ("hdp", "tp")}
        across = "network" if ranks_per_node == 1 else "node"
        assert axes == {("tp", across), *([] if workers == tp else [("hdp", "network")])}


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
    return run_ranks(3, _records, _config(corpus, 3), tmp_path_factory.mktemp("records"))


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
    ledger = ByteLedger()
    for of_rank in records:
        for record in of_rank:
            ledger(record)
    # prepare, write, manifest, commit: after each, did anyone fail?
    assert ledger.take_step(2, "checkpoint") == (
        Traffic("checkpoint", "all_reduce", "host", "node", 4 * 3 * 8, 4 * 2 * (3 - 1) * 8, 4 * 3),
    )


@pytest.mark.parametrize(("ranks_per_node", "nodes"), [(None, (0, 0, 0, 0)), ("2", (0, 0, 1, 1)), ("3", (0, 0, 0, 1))])
def test_nodes_come_from_the_environment(ranks_per_node: str | None, nodes: tuple[int, ...]) -> None:
    assert run_ranks(4, _nodes, ranks_per_node) == [nodes] * 4


def _nodes(rank: int, workers: int, ranks_per_node: str | None) -> tuple[int, ...]:
    if ranks_per_node is not None:
        os.environ["LOCAL_WORLD_SIZE"] = ranks_per_node
    return nodes_of_ranks()
