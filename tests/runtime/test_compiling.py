"""Compiled blocks compute the same, and are compiled once for every bucket, whatever the number of layers and steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from evermesh.fault.events import read_events
from evermesh.parallelism import Layout, plan_batch
from evermesh.parallelism.tensor import padded_length
from evermesh.runtime import StepReport, TrainConfig
from evermesh.runtime.compiling import padding_of
from evermesh.runtime.config import CompileConfig
from evermesh.runtime.errors import CannotCompile
from evermesh.runtime.trainer import Trainer
from tests.cluster import run_ranks
from tests.runtime.parity import COST, MODEL, Case, recomputed, worst_errors

LENGTHS = (37, 20, 5, 61, 2)
BUCKETS = (40, 70)
ONE_BUCKET = (70,)


def _case(model: dict[str, Any], *, recompute: bool = False, **layout: Any) -> Case:
    whole = Layout.model_validate({"capacity": 70} | layout)
    plan = plan_batch(LENGTHS, whole, COST)
    return Case(recomputed(plan) if recompute else plan, "float64", MODEL.model_copy(update=model), whole, ONE_BUCKET)


@pytest.mark.parity
def test_gradients_of_compiled_blocks_on_two_ranks_equal_one_process() -> None:
    """Both on one mesh, so that two ranks compile once; the second one computes its blocks again."""
    cases = [_case({"layers": 4}, tp=2), _case({"layers": 4}, tp=2, recompute=True)]
    for case in cases:
        counts = [micro_batch.num_tokens for micro_batches in case.plan.ranks for micro_batch in micro_batches]
        assert any(padded_length(count, 2, ONE_BUCKET) > padded_length(count, 2) for count in counts)
    assert max(worst_errors(cases)) <= 1e-9


MOE = {"experts": 4, "ffn": 16, "shared_ffn": 16, "first_dense_layers": 1}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ({}, {"hdp": 2}),
        ({"qk_norm": True, "qkv_bias": True, "sliding_window": 9, "window_layers": (1,)}, {"hdp": 2}),
        ({"parallel_block": True, "tied_embeddings": True}, {"pp": 2}),
        ({"moe": MOE | {"balancing": {"kind": "document_loss"}, "capacity_factor": 1.0}}, {"tp": 2, "ep": 2}),
        ({"moe": MOE}, {"hdp": 2, "ep": 2}),
    ],
    ids=str,
)
def test_compiled_blocks_on_the_wide_matrix(model: dict[str, Any], layout: dict[str, Any]) -> None:
    config = type(MODEL).model_validate(MODEL.model_dump() | {"layers": 3 if "pp" not in layout else 2} | model)
    whole = Layout.model_validate({"capacity": 70} | layout)
    assert worst_errors([Case(plan_batch(LENGTHS, whole, COST), "float64", config, whole, BUCKETS)])[0] <= 1e-9


def _config(corpus: Path, compiled: dict[str, Any] | None) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48},
            "data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 256, "batch_tokens": 900},
            "layout": {"capacity": 256},
            "evaluation": {"every": 2, "tokens": 300},
            "compile": compiled,
            "dtype": "float64",
            "steps": 4,
        }
    )


def _train(rank: int, ranks: int, config: TrainConfig, directory: Path) -> list[StepReport]:
    reports: list[StepReport] = []
    Trainer(config, directory=directory, report=reports.append).fit()
    return reports


def test_a_run_compiles_each_bucket_once_and_says_so(corpus: Path, tmp_path: Path) -> None:
    [plain] = run_ranks(1, _train, _config(corpus, None), tmp_path / "plain")
    [reports] = run_ranks(1, _train, _config(corpus, {"buckets": [128, 256]}), tmp_path / "compiled", timeout_s=170.0)
    for report, expected in zip(reports, plain, strict=True):
        for ours, wanted in ((report.loss, expected.loss), (report.held_out_loss, expected.held_out_loss)):
            assert ours == wanted or (ours and wanted and abs(ours - wanted) <= 1e-9 * wanted)
        assert report.padding_tokens > expected.padding_tokens == 0
    assert 0 < reports[-1].compiled_graphs <= 2 * 3
    told = [event for event in read_events(tmp_path / "compiled" / "events.jsonl") if event.kind == "compiled"]
    assert 1 <= len(told) <= 2
    assert told[-1].text.startswith(f"{reports[-1].compiled_graphs} graphs for ")


def test_buckets_of_a_capacity_are_near_each_other() -> None:
    buckets = CompileConfig().of_capacity(2048)
    assert buckets == (64, 91, 128, 181, 256, 362, 512, 724, 1024, 1448, 2048)
    for count in range(65, 2049):
        assert count <= padded_length(count, 1, buckets) <= 1.43 * count
    plan = plan_batch((300, 40), Layout(capacity=300), COST)
    assert padding_of(plan, 2, (64, 311)) == (312 - 300) + (64 - 40)
    assert padding_of(plan, 2, ()) == 0


@pytest.mark.parametrize(
    ("layout", "compiled", "text"),
    [
        ({"capacity": 2048}, {"buckets": [512, 1024]}, r"buckets end at 1024 tokens, but a micro-batch can have 2048"),
        ({}, {"buckets": [4096, 2048]}, r"buckets \[4096, 2048\] do not ascend"),
        ({"activations": "offload"}, {}, r"Set layout.activations to recompute or keep, or leave train.compile out"),
        ({"pp": 2, "schedule": "zero-bubble"}, {}, r"Set layout.schedule to 1f1b, or leave train.compile out"),
    ],
)
def test_what_cannot_be_compiled_is_refused(layout: dict[str, Any], compiled: dict[str, Any], text: str) -> None:
    data = {"sources": [{"kind": "corpus", "path": "nowhere"}]}
    with pytest.raises(ValueError, match=text):
        TrainConfig.model_validate({"data": data, "layout": layout, "compile": compiled})


def _without_compiler(rank: int, ranks: int, corpus: Path) -> str:
    import os

    os.environ["PATH"], os.environ["CXX"] = "", "no-such-compiler"
    with pytest.raises(CannotCompile) as error:
        Trainer(_config(corpus, {}))
    assert not torch._dynamo.utils.counters["stats"]
    return str(error.value)


def test_without_a_compiler_the_error_tells_the_way_out(corpus: Path) -> None:
    [text] = run_ranks(1, _without_compiler, corpus)
    assert "needs a C++ compiler, and there is none" in text
    assert "or leave train.compile out" in text
