"""Tensor-parallel ranks that hide communication in chunks compute what one process does; what cannot be hidden is refused."""

import dataclasses
from typing import Any

import pytest

from evermesh.parallelism import Layout, LayoutDoesNotFit, MicroBatch, plan_batch
from evermesh.runtime import TrainConfig
from evermesh.runtime.layout import check_model
from evermesh.runtime.model.config import ModelConfig
from tests.runtime.parity import COST, MANY_HEADS, Case, plan_by_hand, worst_errors

LENGTHS = (1, 97, 40, 13, 2, 61, 29, 7)
EXPERTS: dict[str, Any] = {"experts": 4, "ffn": 16, "first_dense_layers": 1, "shared_ffn": 16}
GATED: dict[str, Any] = EXPERTS | {"router": "sigmoid", "shared_gate": True}
BY_DOCUMENT: dict[str, Any] = EXPERTS | {"balancing": {"kind": "document_loss"}}
DIVIDED: dict[str, Any] = {"parameters": "all", "gradients": "all", "keep_for": "micro_batch"}


def _case(config: ModelConfig = MANY_HEADS, **layout: Any) -> Case:
    degrees = {"capacity": max(41, -(-97 // layout.get("hdp", 1)))} | layout
    fitting = Layout.model_validate(degrees)
    return Case(plan_batch(LENGTHS, fitting, COST), "float64", config, fitting)


def _with(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(MANY_HEADS.model_dump() | changes)


def test_two_ranks_with_chunks_equal_one_process() -> None:
    cases = [
        _case(tp=2, tp_chunks=2),
        _case(tp=2, tp_chunks=3, activations="recompute"),
        _case(_with(moe=GATED), tp=2, tp_chunks=3, activations=["keep", "recompute"]),
        _case(_with(moe=EXPERTS, parallel_block=True), tp=2, tp_chunks=2, ep=2, activations="recompute"),
    ]
    of_few_tokens = plan_by_hand((1, 5, 3, 7), [[(0, (0,))], [(1, (0,))], [(2, (0,)), (3, (0,))]], ranks=1)
    cases.append(Case(of_few_tokens, "float64", MANY_HEADS, Layout(tp=2, tp_chunks=3)))
    assert max(worst_errors(cases)) <= 1e-9


def test_four_ranks_with_chunks_equal_one_process() -> None:
    cases = [
        _case(tp=4, tp_chunks=2, activations="recompute"),
        _case(_with(moe=BY_DOCUMENT), tp=4, tp_chunks=3, activations="recompute", ep=2, etp=2),
        _case(hdp=2, tp=2, tp_chunks=3, sharding=DIVIDED, activations="recompute"),
        _case(_with(layers=4), pp=2, tp=2, tp_chunks=2, schedule="zero-bubble", virtual_stages=2),
    ]
    with_idle_ranks = plan_by_hand((3,), [[(0, (1,))]], ranks=2)
    together = ((dataclasses.replace(mb, lock_step=0),) for mb in (MicroBatch(()), *with_idle_ranks.ranks[1]))
    with_idle_ranks = dataclasses.replace(with_idle_ranks, ranks=tuple(together))
    divided = Layout.model_validate({"hdp": 2, "tp": 2, "tp_chunks": 2, "sharding": DIVIDED})
    cases.append(Case(with_idle_ranks, "float64", MANY_HEADS, divided))
    assert max(worst_errors(cases)) <= 1e-9


@pytest.mark.parity
@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("moe", [None, EXPERTS, GATED, BY_DOCUMENT])
def test_chunks_on_the_wide_matrix(moe: dict[str, Any] | None, activations: str) -> None:
    layouts: list[dict[str, Any]] = [
        {"tp": 4, "tp_chunks": 2},
        {"tp": 4, "tp_chunks": 3},
        {"hdp": 2, "tp": 2, "tp_chunks": 2, "sharding": {"gradients": "all"}},
        {"hdp": 2, "tp": 2, "tp_chunks": 3, "sharding": DIVIDED},
        {"pp": 2, "tp": 2, "tp_chunks": 2, "schedule": "zero-bubble-v", "virtual_stages": 2},
        {"pp": 2, "tp": 2, "tp_chunks": 3, "schedule": "interleaved-1f1b", "virtual_stages": 2},
    ]
    config = _with(moe=moe, layers=4)
    assert max(worst_errors([_case(config, activations=activations, **layout) for layout in layouts])) <= 1e-9


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ({}, r"layout.tp_chunks is 2, but with layout.tp 1 .*\. Leave it out, or share the model with layout.tp"),
        ({"tp": 2, "activations": "offload"}, r"Set layout.tp_chunks to 1, or layout.activations to recompute or keep"),
    ],
)
def test_chunks_that_hide_nothing_or_miss_what_offloads_are_refused(layout: dict[str, Any], text: str) -> None:
    with pytest.raises(LayoutDoesNotFit, match=text) as failure:
        check_model(Layout.model_validate(layout | {"tp_chunks": 2}), MANY_HEADS)
    assert failure.value.axis == "tp_chunks"


def test_chunks_of_compiled_blocks_are_refused() -> None:
    data = {"sources": [{"kind": "corpus", "path": "nowhere"}]}
    values = {"data": data, "model": MANY_HEADS, "layout": {"tp": 2, "tp_chunks": 2}, "compile": {}}
    with pytest.raises(ValueError, match=r"Set layout.tp_chunks to 1, or leave train.compile out"):
        TrainConfig.model_validate(values)
