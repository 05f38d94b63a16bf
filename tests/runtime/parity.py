"""Loss and gradients of planned micro-batches on real ranks, and of one process that does no parallelism."""

import dataclasses
from functools import cache

import torch
from torch import Tensor

from evermesh.parallelism import BatchPlan, Certificate, CostModel, Layout, MicroBatch, Piece, verify_plan
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.tensor import Cut
from evermesh.parallelism.tensor.apply import apply_tensor_parallel
from evermesh.runtime import process_group
from evermesh.runtime.config import ModelConfig
from evermesh.runtime.flat import FlatParameters, ParameterSet, sum_gradients
from evermesh.runtime.micro_batch import LocalMicroBatch, MicroBatchRunner
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.model.sharding import DECODER_SHARDING
from tests.cluster import run_ranks
from tests.oracle import plain_attention, relative_error

VOCABULARY = 61
MODEL = ModelConfig(hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, initial_std=0.2)
MANY_HEADS = ModelConfig(hidden=32, layers=2, heads=8, kv_heads=4, ffn=48, initial_std=0.2)
"""For four tensor-parallel ranks."""
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


def small_model(dtype: str, config: ModelConfig = MODEL) -> Decoder:
    model = Decoder(config, VOCABULARY)
    model.initialize(seed=3)
    return model.to(getattr(torch, dtype))


@cache
def expected(lengths: tuple[int, ...], config: ModelConfig) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one process that runs every document alone with attention written out, in float64."""
    model = small_model("float64", config)
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


def local_micro_batch(micro_batch: MicroBatch, lengths: tuple[int, ...]) -> LocalMicroBatch:
    """The made-up tokens of one micro-batch."""
    empty = torch.empty(0, dtype=torch.int64)
    tokens, targets, positions, counts = [empty], [empty], [empty], [torch.empty(0)]
    for piece in micro_batch.pieces:
        document = _document(piece.sequence, lengths[piece.sequence])
        for start, stop in piece.ranges:
            for parts, whole in zip((tokens, targets, counts), document, strict=True):
                parts.append(whole[start:stop])
            positions.append(torch.arange(start, stop))
    return LocalMicroBatch(micro_batch, *(torch.cat(parts) for parts in (tokens, targets, positions, counts)))


Held = list[tuple[str, Cut, Tensor]]
"""What a rank holds: name, cut, and its part."""


def _rank_gradients(
    rank: int, world_size: int, plan_json: bytes, dtype: str, config: ModelConfig, tp: int
) -> tuple[float, int, Held]:
    plan = BatchPlan.from_json(plan_json)
    groups = process_group.communicators(60.0, Layout(hdp=world_size // tp, tp=tp))
    model = small_model(dtype, config)
    flat = FlatParameters(model, groups.hdp.size, apply_tensor_parallel(model, DECODER_SHARDING, groups.tp))
    documents = [_document(sequence, length) for sequence, length in enumerate(plan.lengths)]
    num_counted = int(sum(counts.sum() for _, _, counts in documents))
    micro_batches = [local_micro_batch(micro_batch, plan.lengths) for micro_batch in plan.ranks[rank // tp]]
    loss = MicroBatchRunner(model, groups.hdp, groups.tp).accumulate(micro_batches, plan.lengths, num_counted)
    groups.world.all_reduce(loss, "scalars")
    sum_gradients([ParameterSet(flat, groups.hdp, groups.tp)])
    cuts = {entry.name: entry.cut for entry in flat.entries}
    held = [(name, cuts[name], p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None]
    return loss.item(), groups.tp.rank, held


def worst_error(plan: BatchPlan, dtype: str, config: ModelConfig = MODEL, tp: int = 1) -> float:
    """Largest relative error of the loss and of any parameter's gradient, over all HDP ranks."""
    verify_plan(plan, plan.lengths, Layout(hdp=len(plan.ranks), capacity=plan.capacity))
    loss, gradients = expected(plan.lengths, config)
    results = run_ranks(len(plan.ranks) * tp, _rank_gradients, plan.to_json(), dtype, config, tp)
    errors = [abs(rank_loss - loss) / loss for rank_loss, _, _ in results]
    for hdp_rank in range(len(plan.ranks)):
        whole = joined([(tp_rank, held) for _, tp_rank, held in results[hdp_rank * tp : (hdp_rank + 1) * tp]])
        assert whole.keys() == gradients.keys()
        errors += [relative_error(whole[name].double(), gradients[name]) for name in gradients]
    return max(errors)


def joined(parts: list[tuple[int, Held]]) -> dict[str, Tensor]:
    """The whole tensors, given what every rank of one tensor-parallel group holds; what all hold is the same, bit for bit."""
    whole: dict[str, Tensor] = {}
    for tp_rank, held in parts:
        for name, cut, part in held:
            if cut.dim is None:
                assert torch.equal(whole.setdefault(name, part), part), f"replicas of {name} differ"
                continue
            start, stop = cut.span(tp_rank)
            target = whole.setdefault(name, torch.full(cut.shape, float("nan"), dtype=part.dtype))
            target.narrow(cut.dim, start, stop - start).copy_(part)
    return whole


def plan_by_hand(lengths: tuple[int, ...], units: list[Unit], ranks: int) -> BatchPlan:
    """A plan whose micro-batches are given as (sequence, ring) pairs; each is run by all ranks of its rings."""
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


def recomputed(plan: BatchPlan) -> BatchPlan:
    """The same plan with recomputation of blocks."""
    ranks = tuple(
        tuple(dataclasses.replace(micro_batch, recompute="block") for micro_batch in micro_batches)
        for micro_batches in plan.ranks
    )
    return dataclasses.replace(plan, ranks=ranks)
