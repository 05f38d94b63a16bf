"""Loss and gradients of planned micro-batches on real ranks, and of one process that does no parallelism."""

import dataclasses
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from evermesh.parallelism import BatchPlan, Certificate, CostModel, Layout, MicroBatch, Piece, verify_plan
from evermesh.parallelism.experts.documents import TokenContext
from evermesh.parallelism.pieces import share_of
from evermesh.runtime import process_group
from evermesh.runtime.config import ModelConfig, TrainConfig
from evermesh.runtime.flat import AnyCut
from evermesh.runtime.micro_batch import LocalBatch, LocalMicroBatch
from evermesh.runtime.model.building import build_model, build_runner
from evermesh.runtime.model.decoder import Decoder
from tests.cluster import run_ranks
from tests.oracle import gradient, plain_attention, relative_error

VOCABULARY = 61
STEP, SEED = 7, 3
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
    for sequence, (tokens, targets, counts) in enumerate(documents):
        alone = MicroBatch((Piece(sequence, ((0, len(tokens)),), (0,)),))
        context = TokenContext(alone, lengths, identities(lengths), num_tokens=sum(lengths), step=STEP, seed=SEED)
        logits = model(tokens, torch.arange(len(tokens)), plain_attention, context=context)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        loss = loss + (losses * counts).sum() / num_counted
    loss.backward()
    return loss.item(), {
        # an expert that no token chose has no gradient
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def identities(lengths: tuple[int, ...]) -> tuple[str, ...]:
    """What every made-up document is."""
    return tuple(f"document {sequence}" for sequence in range(len(lengths)))


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


class Held(NamedTuple):
    """What a rank holds of one parameter."""

    name: str
    cut: AnyCut
    owner: tuple[str, int]
    """Which of those that hold the same part, and of which set."""
    sharer: int
    part: Tensor


def local_batch(plan: BatchPlan, hdp_rank: int) -> LocalBatch:
    """What one HDP rank processes."""
    documents = [_document(sequence, length) for sequence, length in enumerate(plan.lengths)]
    num_counted = int(sum(counts.sum() for _, _, counts in documents))
    micro_batches = tuple(local_micro_batch(micro_batch, plan.lengths) for micro_batch in plan.ranks[hdp_rank])
    return LocalBatch(micro_batches, plan.lengths, num_counted, identities(plan.lengths), STEP, SEED)


def train_config(dtype: str, config: ModelConfig, layout: Layout) -> TrainConfig:
    """For what is trained here, which reads no data."""
    data = {"sources": [{"kind": "corpus", "path": "nowhere"}]}
    values = {"dtype": dtype, "model": config, "layout": layout, "data": data, "seed": 3}
    return TrainConfig.model_validate(values)


def _rank_gradients(
    rank: int, world_size: int, plan_json: bytes, dtype: str, config: ModelConfig, layout: Layout
) -> tuple[float, float, list[Held]]:
    plan = BatchPlan.from_json(plan_json)
    groups = process_group.communicators(60.0, layout, experts=config.moe is not None, tied=config.tied_embeddings)
    built = build_model(train_config(dtype, config, layout), VOCABULARY, groups, torch.device("cpu"))
    runner = build_runner(built, layout, groups)
    for _ in range(2):  # what a step leaves behind must not change the next
        built.zero_gradients()
        loss, _ = runner.accumulate(local_batch(plan, groups.place.hdp))
        square = built.sum_gradients()
    scalars = torch.stack([loss, square])
    groups.world.all_reduce(scalars, "scalars")
    named = dict(built.model.named_parameters())
    held = [
        Held(
            entry.name, entry.cut, (str(number), parameters.owners.rank), parameters.sharer, gradient(named[entry.name])
        )
        for number, parameters in enumerate(built.sets)
        for entry in parameters.flat.entries
    ]
    return scalars[0].item(), scalars[1].item() ** 0.5, held


def worst_error(
    plan: BatchPlan, dtype: str, config: ModelConfig = MODEL, tp: int = 1, layout: Layout | None = None
) -> float:
    """Largest relative error of the loss, of any parameter's gradient on any rank, and of the norm of them all.

    ``layout`` by default has the HDP ranks of the plan and ``tp``.
    """
    layout = layout or Layout(hdp=len(plan.ranks), tp=tp, capacity=plan.capacity)
    verify_plan(plan, plan.lengths, layout)
    loss, gradients = expected(plan.lengths, config)
    norm = torch.stack([of_one.norm() for of_one in gradients.values()]).norm().item()
    results = run_ranks(layout.world_size, _rank_gradients, plan.to_json(), dtype, config, layout)
    errors = [abs(rank_loss - loss) / loss for rank_loss, _, _ in results]
    errors += [abs(rank_norm - norm) / norm for _, rank_norm, _ in results]
    whole = joined([held for _, _, of_rank in results for held in of_rank])
    assert {name for _, name in whole} == gradients.keys()
    errors += [relative_error(whole[owner, name].double(), gradients[name]) for owner, name in whole]
    return max(errors)


def joined(parts: list[Held]) -> dict[tuple[tuple[str, int], str], Tensor]:
    """The whole tensors of every owner; what all its sharers hold is the same, bit for bit."""
    whole: dict[tuple[tuple[str, int], str], Tensor] = {}
    for name, cut, owner, sharer, part in parts:
        if cut.dim is None:
            assert torch.equal(whole.setdefault((owner, name), part), part), f"replicas of {name} differ"
            continue
        target = whole.setdefault((owner, name), torch.full(cut.shape, float("nan"), dtype=part.dtype))
        for dim, (start, size) in enumerate(zip(cut.offsets(sharer), cut.local_shape(sharer), strict=True)):
            target = target.narrow(dim, start, size)
        target.copy_(part)
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
