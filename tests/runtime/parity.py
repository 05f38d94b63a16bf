"""Loss and gradients of planned micro-batches on real ranks, and of one process that does no parallelism."""

import argparse
import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from evermesh.parallelism import BatchPlan, Certificate, CostModel, Layout, MicroBatch, Piece, verify_plan
from evermesh.parallelism.experts import Placement
from evermesh.parallelism.experts.documents import TokenContext
from evermesh.parallelism.experts.hot import HotExperts
from evermesh.parallelism.gradients import gradient_of
from evermesh.parallelism.pieces import share_of
from evermesh.runtime import process_group
from evermesh.runtime.compiling import Compiled
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.flat import AnyCut
from evermesh.runtime.micro_batch import LocalBatch, LocalMicroBatch
from evermesh.runtime.model.building import build_model, build_runner
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.optimizer import ShardedAdamW
from evermesh.runtime.optimizer_config import AdamWConfig
from evermesh.runtime.parameter_set import ParameterSet
from tests.cluster import run_ranks
from tests.oracle import gradient, plain_attention, relative_error

VOCABULARY = 61
STEP, SEED = 7, 3
OPTIMIZER = AdamWConfig(lr=0.1, eps=1e-3, clip_norm=0.05, weight_decay=0.3)
"""With an eps that keeps the first update from being the sign of gradients near zero."""
MODEL = ModelConfig(hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, initial_std=0.2)
MANY_HEADS = ModelConfig(hidden=32, layers=2, heads=8, kv_heads=4, ffn=48, initial_std=0.2)
"""For four tensor-parallel ranks."""
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
COST = CostModel(token_s=1e-5, pair_s=1e-7, micro_batch_s=1e-4, piece_s=1e-5, ring_step_s=1e-5, ring_token_s=1e-7)
Document = tuple[Tensor, Tensor, Tensor]
Unit = list[tuple[int, tuple[int, ...]]]
"""A micro-batch by hand: sequences and their rings."""


@cache
def _text() -> Tensor:
    """Real text: source of the standard library, byte by byte."""
    return torch.tensor(list(Path(argparse.__file__).read_bytes()), dtype=torch.int64) % VOCABULARY


def _document(sequence: int, length: int) -> Document:
    """Tokens, targets and which of them count (some do not)."""
    tokens = _text()[1000 * sequence : 1000 * sequence + length + 1]
    counts = (torch.rand(length, generator=torch.Generator().manual_seed(sequence)) < 0.9).float()
    return tokens[:-1], tokens[1:], counts


def small_model(dtype: str, config: ModelConfig = MODEL) -> Decoder:
    model = Decoder(config, VOCABULARY)
    model.initialize(seed=3)
    return model.to(getattr(torch, dtype))


class Outcome(NamedTuple):
    """What one step did."""

    loss: float
    gradients: dict[str, Tensor]
    norm: float
    """Of all gradients together."""
    updated: dict[str, Tensor]
    """Parameters after an update."""


@cache
def expected(lengths: tuple[int, ...], config: ModelConfig) -> Outcome:
    """One process that runs every document alone with attention written out, in float64, and updates with torch's AdamW."""
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
    for parameter in model.parameters():
        if parameter.grad is None:  # of an expert that no token chose
            parameter.grad = torch.zeros_like(parameter)
    gradients = {name: gradient(parameter).clone() for name, parameter in model.named_parameters()}
    norm = torch.stack([of_one.norm() for of_one in gradients.values()]).norm().item()
    for parameter in model.parameters():
        gradient(parameter).mul_((OPTIMIZER.clip_norm or math.inf) / norm)
    assert norm > 2 * (OPTIMIZER.clip_norm or 0), "nothing is clipped"
    decayed = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": OPTIMIZER.weight_decay}]
    others = [{"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    torch.optim.AdamW(decayed + others, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps).step()
    updated = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Outcome(loss.item(), gradients, norm, updated)


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


class Result(NamedTuple):
    """What one rank saw and holds after a step."""

    loss: float
    norm: float
    gradients: list[Held]
    updated: list[Held]


def local_batch(plan: BatchPlan, hdp_rank: int) -> LocalBatch:
    """What one HDP rank processes."""
    documents = [_document(sequence, length) for sequence, length in enumerate(plan.lengths)]
    num_counted = int(sum(counts.sum() for _, _, counts in documents))
    micro_batches = tuple(local_micro_batch(micro_batch, plan.lengths) for micro_batch in plan.ranks[hdp_rank])
    return LocalBatch(micro_batches, plan.lengths, num_counted, identities(plan.lengths), STEP, SEED)


class Case(NamedTuple):
    """What is trained, and how it is spread."""

    plan: BatchPlan
    dtype: str
    config: ModelConfig
    layout: Layout
    buckets: tuple[int, ...] = ()
    """Numbers of tokens that blocks are compiled for; none: they are not."""


def train_config(dtype: str, config: ModelConfig, layout: Layout) -> TrainConfig:
    """For what is trained here; it reads no data."""
    data = {"sources": [{"kind": "corpus", "path": "nowhere"}]}
    values = {"dtype": dtype, "model": config, "layout": layout, "data": data, "seed": 3}
    return TrainConfig.model_validate(values)


def _on_rank(rank: int, world_size: int, cases: list[Case]) -> list[Result]:
    return [_run(case) for case in cases]


def _run(case: Case) -> Result:
    groups = process_group.communicators(
        60.0, case.layout, experts=case.config.moe is not None, tied=case.config.tied_embeddings
    )
    config = train_config(case.dtype, case.config, case.layout)
    built = build_model(config, VOCABULARY, groups, torch.device("cpu"))
    optimizer = ShardedAdamW(built.sets, OPTIMIZER, built.tied)
    runner = build_runner(built, case.layout, groups, case.buckets)
    compiled = Compiled()
    if case.buckets:
        compiled.apply(built.model, case.buckets, groups.moment)
    hot = HotExperts(built.model, groups.ep)
    for _ in range(2):  # what a step leaves behind must not change the next
        built.begin_step()
        copied = range(case.config.layers) if case.layout.hot_experts else range(0)
        with built.gathered_experts(copied):
            hot.begin_step({name: _copied(case) for name in hot.names if copied})
        loss, _ = runner.accumulate(local_batch(case.plan, groups.place.hdp))
        hot.end_step()
        built.reduce_experts(copied)
        square = built.sum_gradients()
    assert compiled.graphs <= 3 * len(case.buckets)
    scalars = torch.stack([loss, square])
    groups.world.all_reduce(scalars, "scalars")
    gradients = _held(built.sets, [_whole_gradient(parameters) for parameters in built.sets])
    norm = scalars[1].item() ** 0.5
    optimizer.step(OPTIMIZER.lr, min(1.0, (OPTIMIZER.clip_norm or math.inf) / norm))
    built.end_step()
    for parameters in built.sets:
        parameters.gather()
    return Result(scalars[0].item(), norm, gradients, _held(built.sets, [dict(of.parameters) for of in built.sets]))


def _whole_gradient(parameters: ParameterSet) -> Mapping[str, Tensor]:
    """The summed gradients, by name; from all that hold a part of them, where they are divided. Collective."""
    flat, owners = parameters.flat, parameters.owners
    if owners.division.gradients == 1:
        return {name: gradient_of(parameter) for name, parameter in parameters.parameters.items()}
    whole = torch.zeros(flat.padded, dtype=parameters.gradients.dtype)
    whole[flat.owned(owners.rank)] = parameters.owned_gradient
    owners.all.all_reduce(whole, "test")
    whole /= owners.division.ranks // owners.division.states
    entries = {entry.name: entry for entry in flat.entries}
    return {
        name: whole[entries[name].start :][: parameter.numel()].view(parameter.shape)
        for name, parameter in parameters.parameters.items()
    }


def _held(sets: list[ParameterSet], tensors: Sequence[Mapping[str, Tensor]]) -> list[Held]:
    """Copies of what this rank holds, by name."""
    return [
        Held(
            entry.name,
            entry.cut,
            (str(number), of.owners.rank),
            of.sharers.number,
            of_set[entry.name].detach().clone(),
        )
        for number, (of, of_set) in enumerate(zip(sets, tensors, strict=True))
        for entry in of.flat.entries
    ]


def _copied(case: Case) -> Placement:
    """One expert of the first rank on every other, one of the last on the first."""
    assert case.config.moe is not None
    experts, ranks = case.config.moe.experts, case.layout.ep
    return Placement(experts, ranks, {0: tuple(range(1, ranks)), experts - 1: (0,)})


def worst_error(
    plan: BatchPlan, dtype: str, config: ModelConfig = MODEL, tp: int = 1, layout: Layout | None = None
) -> float:
    """``worst_errors`` of one case; ``layout`` by default has the HDP ranks of the plan and ``tp``."""
    return worst_errors(
        [Case(plan, dtype, config, layout or Layout(hdp=len(plan.ranks), tp=tp, capacity=plan.capacity))]
    )[0]


def worst_errors(cases: list[Case]) -> list[float]:
    """Largest relative error of the loss, of any parameter's gradient on any rank, of the norm of them all, and of any
    parameter after a clipped update. The cases have the same number of ranks."""
    cases = [_with_policy(case) for case in cases]
    for case in cases:
        verify_plan(case.plan, case.plan.lengths, case.layout)
    results = run_ranks(cases[0].layout.world_size, _on_rank, cases, timeout_s=170.0)
    return [_error_of(case, of_case) for case, of_case in zip(cases, zip(*results, strict=True), strict=True)]


def _with_policy(case: Case) -> Case:
    """Where the plan computes blocks again and the layout does not say otherwise, all of them are."""
    repeats = any(micro_batch.recompute == "block" for of_rank in case.plan.ranks for micro_batch in of_rank)
    if not repeats or case.layout.recompute == "block":
        return case
    return case._replace(layout=case.layout.model_copy(update={"activations": "recompute"}))


def _error_of(case: Case, results: Sequence[Result]) -> float:
    wanted = expected(case.plan.lengths, case.config)
    errors = [abs(result.loss - wanted.loss) / wanted.loss for result in results]
    errors += [abs(result.norm - wanted.norm) / wanted.norm for result in results]
    gradients = joined([held for result in results for held in result.gradients])
    updated = joined([held for result in results for held in result.updated])
    for whole, expected_of in ((gradients, wanted.gradients), (updated, wanted.updated)):
        assert {name for _, name in whole} == expected_of.keys()
        errors += [relative_error(whole[owner, name].double(), expected_of[name]) for owner, name in whole]
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


def with_schemes(plan: BatchPlan, layout: Layout, seed: int) -> BatchPlan:
    """The same plan with a drawn scheme of attention for every ring, of those that the layout allows."""
    dice = random.Random(seed)

    def scheme(piece: Piece) -> tuple[int, bool]:
        fitting = [
            ways for ways in range(1, len(piece.ring) + 1) if math.gcd(layout.ulysses, len(piece.ring)) % ways == 0
        ]
        return dice.choice(fitting), layout.gathers_keys and dice.random() < 0.4

    pieces = [piece for of_rank in plan.ranks for micro_batch in of_rank for piece in micro_batch.pieces]
    schemes = {piece.sequence: scheme(piece) for piece in pieces if len(piece.ring) > 1}

    def chosen(piece: Piece) -> Piece:
        heads, gathers = schemes.get(piece.sequence, (1, False))
        return dataclasses.replace(piece, heads=heads, gathers=gathers)

    ranks = tuple(
        tuple(dataclasses.replace(mb, pieces=tuple(map(chosen, mb.pieces))) for mb in of_rank) for of_rank in plan.ranks
    )
    return dataclasses.replace(plan, ranks=ranks)


def recomputed(plan: BatchPlan) -> BatchPlan:
    """The same plan with recomputation of blocks."""
    ranks = tuple(
        tuple(dataclasses.replace(micro_batch, recompute="block") for micro_batch in micro_batches)
        for micro_batches in plan.ranks
    )
    return dataclasses.replace(plan, ranks=ranks)
