"""Models of transformers on many ranks against the same models, unmodified, in one process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from evermesh.checkpoint import checkpoints
from evermesh.parallelism import ByteLedger, Layout, LayoutDoesNotFit, SequenceTooLong
from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.ledger import Traffic, add_up, collective_traffic
from evermesh.runtime.errors import BatchInvalid
from evermesh.runtime.own_model import read_weights
from tests.cluster import run_ranks
from tests.oracle import relative_error
from tests.runtime.own_models import (
    CLIP,
    MODELS,
    Case,
    documents,
    expected,
    found_by_ranks,
    labels,
    make_model,
    optimizer_of,
    parallel_model,
    whole,
    worst,
)

LENGTHS = (120, 41, 33, 17, 9, 2, 30)
ONE, EQUAL = (9,), (64,) * 5
FOUR, TWO_BY_TWO = Layout(hdp=4, capacity=48), Layout(hdp=2, tp=2, capacity=64)
RECOMPUTED = TWO_BY_TWO.model_copy(update={"activations": "recompute"})
TOLERANCE = 1e-9
CASES = (
    Case("llama", LENGTHS, FOUR),
    Case("llama", EQUAL, TWO_BY_TWO),
    Case("llama tied, with biases", LENGTHS, TWO_BY_TWO),
    Case("qwen3", ONE, FOUR),
    Case("qwen3", LENGTHS, TWO_BY_TWO),
    Case("qwen3", LENGTHS, RECOMPUTED),
    Case("mistral with a window", LENGTHS, FOUR),
    Case("mistral with a window", LENGTHS, TWO_BY_TWO),
    Case("mixtral", LENGTHS, FOUR),
    Case("gpt2", LENGTHS, FOUR),
    Case("llama", (180, 3, 3), FOUR.model_copy(update={"ulysses": 4})),
)


def _name(case: Case) -> str:
    return f"{case.model} {case.lengths} {case.layout.hdp}x{case.layout.tp} {case.layout.recompute}"


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_loss_gradients_and_update_are_those_of_one_process(case: Case) -> None:
    error, what = worst(case, found_by_ranks(CASES)[case])
    assert error <= TOLERANCE, what


def _plan(case: Case) -> BatchPlan:
    return found_by_ranks(CASES)[case][0].plan


def test_the_plans_of_these_cases_have_all_that_is_hard() -> None:
    ring, uneven, idle = _plan(CASES[0]), _plan(CASES[1]), _plan(CASES[3])
    assert 3 in ring.ring_sizes()
    assert [len(micro_batches) for micro_batches in ring.ranks] == [1, 1, 1, 3]
    assert [len(micro_batches) for micro_batches in uneven.ranks] == [3, 2]
    assert [len(micro_batches) for micro_batches in idle.ranks] == [1, 0, 0, 0], "three ranks have no token"
    assert _plan(CASES[-1]).ranks[0][0].pieces[0].heads == 4


WIDE = tuple(
    Case(model, lengths, layout)
    for model in MODELS
    for lengths in (LENGTHS, ONE, EQUAL, (2, 3), (180, 3, 3))
    for layout in (
        FOUR,
        TWO_BY_TWO,
        Layout(hdp=4, capacity=48, activations="recompute"),
        Layout(hdp=2, tp=2, capacity=999),
    )
    if layout.tp == 1 or model not in ("mixtral", "gpt2")
    if max(lengths) <= layout.hdp * layout.capacity
)


@pytest.mark.parity
@pytest.mark.parametrize("case", WIDE, ids=_name)
def test_every_model_on_every_layout(case: Case) -> None:
    of_model = tuple(other for other in WIDE if other.model == case.model)
    error, what = worst(case, found_by_ranks(of_model)[case])
    # the norms of Gemma compute, and sum the gradients of their weights, in float32 whatever the model is in
    assert error <= (1e-5 if "gemma" in case.model else TOLERANCE), what


def _accumulate(rank: int, world_size: int) -> dict[str, float]:
    """Errors of two batches in one step, of an evaluation before it, and of the norm."""
    model = parallel_model("qwen3", TWO_BY_TWO)
    held_out = model.evaluate(documents(LENGTHS), labels(LENGTHS))
    for lengths in (LENGTHS, EQUAL):
        loss = model.train_batch(documents(lengths), labels(lengths))
    first, second = expected("qwen3", LENGTHS), expected("qwen3", EQUAL)
    errors = {"evaluation": abs(held_out - first.loss), "loss": abs(loss - second.loss)}
    for name, parameter in model.named_parameters():
        errors[name] = relative_error(whole(parameter.grad), first.gradients[name] + second.gradients[name])
    return errors


def test_gradients_of_two_batches_add_up_and_an_evaluation_leaves_none() -> None:
    for errors in run_ranks(4, _accumulate):
        assert max(errors.values()) <= TOLERANCE, errors


def _frozen(rank: int, world_size: int) -> dict[str, float | None]:
    """Errors of the gradients of a model whose embedding and first layer are not trained; None: there is none."""
    import evermesh

    mesh, model = evermesh.start(TWO_BY_TWO, device="cpu"), make_model("qwen3")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    parallel = evermesh.parallelize(model, TWO_BY_TWO, mesh)
    parallel.train_batch(documents(LENGTHS), labels(LENGTHS))
    right = expected("qwen3", LENGTHS).gradients
    return {
        name: None if parameter.grad is None else relative_error(whole(parameter.grad), right[name])
        for name, parameter in parallel.named_parameters()
    }


def test_parameters_that_are_not_trained_get_no_gradient_and_change_no_other() -> None:
    for errors in run_ranks(4, _frozen):
        without = {name for name, error in errors.items() if error is None}
        assert without == {name for name in errors if "embed" in name or ".layers.0." in name}
        assert max(error for error in errors.values() if error is not None) <= TOLERANCE, errors


def _save_and_load(rank: int, world_size: int, folder: str) -> tuple[float, dict[str, float]]:
    """One step on one layout, the next on another; returns its loss and the errors of the parameters."""
    first = parallel_model("qwen3", TWO_BY_TWO)
    optimizer = optimizer_of(first.parameters())
    first.train_batch(documents(LENGTHS), labels(LENGTHS))
    first.clip_grad_norm_(CLIP)
    optimizer.step()
    first.save(folder, 1, optimizer)

    second = parallel_model("qwen3", FOUR)
    other = torch.optim.AdamW(second.parameters(), lr=7.0)  # rates come with the checkpoint
    assert second.load(folder, other) == 1
    loss = second.train_batch(documents(LENGTHS), labels(LENGTHS))
    second.clip_grad_norm_(CLIP)
    other.step()
    second.save(folder, 2, other)
    right = expected("qwen3", LENGTHS, steps=2)
    updated = {name: relative_error(whole(p), right.updated[name]) for name, p in second.named_parameters()}
    return abs(loss - right.loss), updated


def _train_on_while_saving(rank: int, world_size: int, folder: str) -> tuple[list[int], float]:
    """Three saves that nobody waits for, each with a step behind it; returns what came back of the second, and how far the
    state was then from the one that was saved."""
    model = parallel_model("qwen3", TWO_BY_TWO)
    optimizer, saved = optimizer_of(model.parameters()), {}
    for step in range(3):
        path = model.save(folder, step, optimizer, keep=None, wait=False)  # the first one before there are moments
        assert path.name.endswith(str(step))
        saved[step] = {name: whole(parameter).clone() for name, parameter in model.named_parameters()}
        model.train_batch(documents(LENGTHS), labels(LENGTHS))
        optimizer.step()
        optimizer.zero_grad()
    model.finish_saving()
    found = [info.step for info in checkpoints(folder)]
    model.load(folder, optimizer)
    return found, max(float((whole(p) - saved[2][name]).abs().max()) for name, p in model.named_parameters())


def test_saves_that_nobody_waits_for_hold_the_state_of_their_step(tmp_path: Path) -> None:
    assert run_ranks(4, _train_on_while_saving, str(tmp_path)) == [([0, 1, 2], 0.0)] * 4


def test_a_checkpoint_goes_on_with_another_tp_and_into_one_process(tmp_path: Path) -> None:
    for loss_error, errors in run_ranks(4, _save_and_load, str(tmp_path)):
        assert loss_error <= TOLERANCE
        assert max(errors.values()) <= TOLERANCE, errors
    alone = make_model("qwen3")
    torch.nn.init.zeros_(alone.lm_head.weight)
    assert read_weights(tmp_path, alone) == 2
    for name, parameter in alone.named_parameters():
        assert relative_error(parameter.detach(), expected("qwen3", LENGTHS, steps=2).updated[name]) <= TOLERANCE


def _half(rank: int, world_size: int) -> dict[str, Any]:
    model = parallel_model("llama", FOUR, torch.float32, compute_dtype=torch.bfloat16)
    loss = model.train_batch(documents(LENGTHS), labels(LENGTHS))
    right = expected("llama", LENGTHS)
    error = max(relative_error(whole(p.grad).double(), right.gradients[name]) for name, p in model.named_parameters())
    dtypes = {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters() if p.grad is not None}
    return {"loss": abs(loss - right.loss) / right.loss, "gradient": error, "dtypes": dtypes}


def test_bfloat16_is_computed_with_and_float32_is_kept() -> None:
    for found in run_ranks(4, _half):
        assert 0 < found["loss"] < 0.01
        assert 1e-4 < found["gradient"] < 0.1, "bfloat16 has 8 bits"
        assert found["dtypes"] == {torch.float32}


def _traffic(rank: int, world_size: int, name: str, layout: Layout) -> tuple[list[Traffic], BatchPlan]:
    ledger = ByteLedger()
    model = parallel_model(name, layout, torch.float32, compute_dtype=torch.bfloat16)
    with model.mesh.listen(ledger):
        model.train_batch(documents(LENGTHS), labels(LENGTHS))
        assert model.plan is not None
        return list(ledger.take_step(1)), model.plan


def _part(name: str, shape: Sequence[int], tp: int) -> list[int]:
    """Shape of what a tensor-parallel rank holds of a parameter of Qwen3."""
    part, kind = list(shape), name.split(".")[-2]
    if kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"):
        part[0] //= tp
    elif kind in ("o_proj", "down_proj"):
        part[1] //= tp
    return part


def _sharding_formula(model: Any, layout: Layout) -> list[Traffic]:
    """Every unit is gathered once in bfloat16 and its gradients are summed once in float32; rows are padded."""
    units: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        rows, *rest = _part(name, parameter.shape, layout.tp)
        unit = ".".join(name.split(".")[:3]) if ".layers." in name else "root"
        elements = -(-rows // layout.hdp) * torch.Size(rest).numel()
        units[unit] = units.get(unit, 0) + elements
    found = list[Traffic]()
    for elements in units.values():
        for _ in range(layout.tp):
            found += collective_traffic("parameters", "all_gather", "hdp", 2 * elements, [0] * layout.hdp)
            found += collective_traffic(
                "gradients", "reduce_scatter", "hdp", 4 * elements * layout.hdp, [0] * layout.hdp
            )
    return found


def _tensor_formula(model: Any, layout: Layout, plan: BatchPlan) -> list[Traffic]:
    """Two sums forward and two backward in a layer, one backward at the head, two of the loss; and of norms of heads.

    A layer that is computed again repeats the sum behind its attention; nothing backward needs the one that ends it.
    """
    config, found, nodes = model.config, list[Traffic](), [0] * layout.tp
    for micro_batches in plan.ranks:
        for tokens in (micro_batch.num_tokens for micro_batch in micro_batches):
            activations, layers = 2 * tokens * config.hidden_size, config.num_hidden_layers
            again = layers if layout.recompute == "block" else 0
            for call_site, sums in (("forward", 2 * layers + again), ("backward", 2 * layers + 1)):
                for _ in range(sums):
                    found += collective_traffic(f"tensor {call_site}", "all_reduce", "tp", activations, nodes)
            found += collective_traffic("loss", "all_reduce", "tp", 4 * tokens, nodes)
            found += collective_traffic("loss", "all_reduce", "tp", 4 * 2 * tokens, nodes)
    norms = config.num_hidden_layers * 2 * config.head_dim // layout.hdp
    for _ in range(layout.hdp):
        found += collective_traffic("gradients", "all_reduce", "tp", 4 * norms, nodes)
    return found


@pytest.mark.parametrize("layout", [FOUR, TWO_BY_TWO, RECOMPUTED], ids=["4x1", "2x2", "2x2 recomputed"])
def test_the_ledger_shows_what_the_formulas_say(layout: Layout) -> None:
    found = run_ranks(4, _traffic, "qwen3", layout)
    model, plan = make_model("qwen3"), found[0][1]
    formula = _sharding_formula(model, layout) + (_tensor_formula(model, layout, plan) if layout.tp > 1 else [])
    sites = {traffic.call_site for traffic in formula}
    sent = add_up(traffic for of_rank, _ in found for traffic in of_rank if traffic.call_site in sites)
    assert sent == add_up(formula)
    assert any(traffic.call_site.startswith("ring") for of_rank, _ in found for traffic in of_rank)


def _fails(rank: int, world_size: int) -> list[str]:
    """What is said when a rank gives other documents, when one is too long, and when a plan forgets a norm."""
    said = []
    model = parallel_model("qwen3", TWO_BY_TWO)
    given = documents((30, 30 + (rank == 3)))
    for batch, error in (
        (given, BatchInvalid),
        (documents((130,)), SequenceTooLong),
        ([torch.tensor([1])], BatchInvalid),
    ):
        with pytest.raises(error) as failure:
            model.train_batch(batch)
        said.append(str(failure.value))
    forgetful = _forgetful("qwen3", TWO_BY_TWO)
    try:
        forgetful.train_batch(documents(LENGTHS))
    except ValueError as error:
        said.append(str(error))
    return said


def _forgetful(name: str, layout: Layout) -> Any:
    import evermesh

    mesh = evermesh.start(layout, device="cpu")
    model = make_model(name)
    model._tp_plan = {key: style for key, style in model._tp_plan.items() if not key.endswith("q_norm")}
    return evermesh.parallelize(model, layout, mesh)


def test_what_only_ranks_together_can_see_is_refused_on_all_of_them() -> None:
    for other, long, short, forgotten in run_ranks(4, _fails):
        assert "the documents of the ranks differ" in other
        assert "129 tokens, but 2 HDP ranks with a capacity of 64 tokens hold 128" in long
        assert "document 0 is torch.int64 of shape [1]" in short
        assert "different gradients of model.layers.0.self_attn.q_norm.weight, model.layers.1" in forgotten
        assert "replicated_with_grad_allreduce" in forgotten


def _does_not_divide(rank: int, world_size: int) -> str:
    with pytest.raises(LayoutDoesNotFit) as failure:
        parallel_model("qwen3", Layout(hdp=1, tp=4, capacity=512))
    return str(failure.value)


def test_key_value_heads_that_tp_does_not_divide_are_refused_with_the_degrees_that_do() -> None:
    for said in run_ranks(4, _does_not_divide):
        assert "layout.tp is 4, which does not divide num_key_value_heads 2" in said
        assert "can have a layout.tp of 1, 2" in said
