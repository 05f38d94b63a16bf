"""The first invariant: a batch plan never changes the mathematics."""

import dataclasses
from functools import cache

import pytest
import torch
from torch import Tensor

from evermesh.parallelism import (
    BatchPlan,
    Certificate,
    Communicator,
    CostModel,
    Layout,
    MicroBatch,
    Piece,
    plan_batch,
    verify_plan,
)
from evermesh.parallelism.pieces import share_of
from evermesh.runtime.config import ModelConfig
from evermesh.runtime.micro_batch import LocalMicroBatch, MicroBatchRunner
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.flat import FlatParameters
from tests.cluster import run_ranks
from tests.oracle import plain_attention, relative_error

VOCABULARY = 61
MODEL = ModelConfig(hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, initial_std=0.2)
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
COST = CostModel(token_s=1e-5, pair_s=1e-7, micro_batch_s=1e-4, piece_s=1e-5, ring_step_s=1e-5, ring_token_s=1e-7)
Document = tuple[Tensor, Tensor, Tensor]
Unit = list[tuple[int, tuple[int, ...]]]
"""A micro-batch by hand: sequences and their rings."""


def _document(sequence: int, length: int) -> Document:
    """Tokens, targets and which of them count (some do not)."""
    generator = torch.Generator().manual_seed(1000 + sequence)
    tokens = torch.randint(VOCABULARY, (length + 1,), generator=generator)
    counts = (torch.rand(length, generator=generator) < 0.9).float()
    return tokens[:-1], tokens[1:], counts


def _model(dtype: str) -> Decoder:
    model = Decoder(MODEL, VOCABULARY)
    model.initialize(seed=3)
    return model.to(getattr(torch, dtype))


@cache
def _expected(lengths: tuple[int, ...]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one process that runs every document alone with attention written out, in float64."""
    model = _model("float64")
    documents = [_document(sequence, length) for sequence, length in enumerate(lengths)]
    num_counted = sum(counts.sum() for _, _, counts in documents)
    loss = torch.zeros((), dtype=torch.float64)
    for tokens, targets, counts in documents:
        logits = model(tokens, torch.arange(len(tokens)), plain_attention)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        loss = loss + (losses * counts).sum() / num_counted
    loss.backward()
    return loss.item(), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def _local(micro_batch: MicroBatch, lengths: tuple[int, ...]) -> LocalMicroBatch:
    empty = torch.empty(0, dtype=torch.int64)
    tokens, targets, positions, counts = [empty], [empty], [empty], [torch.empty(0)]
    for piece in micro_batch.pieces:
        document = _document(piece.sequence, lengths[piece.sequence])
        for start, stop in piece.ranges:
            for parts, whole in zip((tokens, targets, counts), document, strict=True):
                parts.append(whole[start:stop])
            positions.append(torch.arange(start, stop))
    return LocalMicroBatch(micro_batch, *(torch.cat(parts) for parts in (tokens, targets, positions, counts)))


def _rank_gradients(rank: int, world_size: int, plan_json: bytes, dtype: str) -> tuple[float, dict[str, Tensor]]:
    import torch.distributed as dist

    plan = BatchPlan.from_json(plan_json)
    communicator = Communicator(dist.group.WORLD)
    model = _model(dtype)
    flat = FlatParameters(model, world_size)
    documents = [_document(sequence, length) for sequence, length in enumerate(plan.lengths)]
    num_counted = int(sum(counts.sum() for _, _, counts in documents))
    micro_batches = [_local(micro_batch, plan.lengths) for micro_batch in plan.ranks[rank]]
    loss = MicroBatchRunner(model, communicator).accumulate(micro_batches, plan.lengths, num_counted)
    communicator.all_reduce(loss, "scalars")
    communicator.all_reduce(flat.gradients, "gradients")
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return loss.item(), gradients


def worst_error(plan: BatchPlan, dtype: str) -> float:
    """Largest relative error of the loss and of any parameter's gradient, over all ranks."""
    verify_plan(plan, plan.lengths, hdp=len(plan.ranks), capacity=plan.capacity)
    loss, expected = _expected(plan.lengths)
    errors = []
    for rank_loss, gradients in run_ranks(len(plan.ranks), _rank_gradients, plan.to_json(), dtype):
        assert gradients.keys() == expected.keys()
        errors.append(abs(rank_loss - loss) / loss)
        errors += [relative_error(gradients[name].double(), expected[name]) for name in expected]
    return max(errors)


def _plan(lengths: tuple[int, ...], units: list[Unit], ranks: int) -> BatchPlan:
    """A plan by hand: each item is a micro-batch, given as (sequence, ring) and run by all ranks of its rings."""
    micro_batches: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    for unit in units:
        for rank in range(ranks):
            pieces = tuple(
                Piece(sequence, share_of(lengths[sequence], len(ring), ring.index(rank)).ranges(), ring)
                for sequence, ring in unit
                if rank in ring
            )
            if pieces:
                micro_batches[rank].append(MicroBatch(pieces))
    certificate = Certificate(1.0, 1.0, "nothing")
    return BatchPlan(lengths, 10_000, tuple(map(tuple, micro_batches)), certificate, "by hand", 0, 0)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_planned_gradients_equal_one_process_without_parallelism(ranks: int, dtype: str) -> None:
    lengths = (1, 97, 40, 13, 2, 61, 29, 7)
    plan = plan_batch(lengths, Layout(hdp=ranks, capacity=max(41, -(-97 // ranks))), COST)
    assert max(plan.ring_sizes()) >= min(ranks, 3)
    assert worst_error(plan, dtype) <= TOLERANCE[dtype]


def test_every_document_on_every_ring_size() -> None:
    lengths = (53, 31, 44, 17)
    units: list[Unit] = [[(0, (0, 1, 2, 3))], [(1, (3, 1, 0))], [(2, (2, 0))], [(3, (1,))]]
    assert worst_error(_plan(lengths, units, ranks=4), "float64") <= 1e-9


def test_rank_without_any_token() -> None:
    assert worst_error(_plan((23, 5), [[(0, (0, 2))], [(1, (0,))]], ranks=4), "float64") <= 1e-9


def test_ring_member_that_holds_no_token() -> None:
    assert worst_error(_plan((2, 30), [[(0, (0, 1, 2))], [(1, (1,))]], ranks=3), "float64") <= 1e-9


def test_ring_share_and_whole_documents_in_one_micro_batch() -> None:
    units: list[Unit] = [[(0, (0, 1, 2)), (1, (0, 1, 2)), (2, (0,)), (3, (2,)), (4, (2,))]]
    assert worst_error(_plan((41, 19, 6, 1, 11), units, ranks=3), "float64") <= 1e-9


def test_recomputation_of_blocks_changes_nothing() -> None:
    plan = _plan((53, 31, 8), [[(0, (0, 1, 2))], [(1, (2, 1))], [(2, (0,))]], ranks=3)
    ranks = tuple(
        tuple(dataclasses.replace(micro_batch, recompute="block") for micro_batch in micro_batches)
        for micro_batches in plan.ranks
    )
    assert worst_error(dataclasses.replace(plan, ranks=ranks), "float64") <= 1e-9


def test_batch_that_no_token_counts_in_gives_zero_gradients() -> None:
    model = _model("float64")
    flat = FlatParameters(model, 1)
    plan = _plan((4,), [[(0, (0,))]], ranks=1)
    local = dataclasses.replace(_local(plan.ranks[0][0], plan.lengths), counts_T=torch.zeros(4))
    assert MicroBatchRunner(model, Communicator()).accumulate([local], plan.lengths, 0).item() == 0.0
    assert flat.gradients.abs().max().item() == 0.0
