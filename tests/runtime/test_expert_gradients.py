"""A decoder with experts on real ranks: any plan, any folding, every way of balancing, against one process."""

import dataclasses
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evermesh.parallelism import Communicator
from evermesh.parallelism.attention.kernels import kernel_for
from evermesh.parallelism.attention.micro_batch import MicroBatchAttention
from evermesh.parallelism.batch_plan import MicroBatch, Piece
from evermesh.parallelism.experts import ExpertSharding
from evermesh.parallelism.experts.apply import apply_expert_parallel
from evermesh.parallelism.experts.balance import ExpertLoads
from evermesh.parallelism.experts.documents import TokenContext
from evermesh.parallelism.experts.traffic import document_traffic
from evermesh.parallelism.ledger import ByteLedger, Traffic, add_up
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.tensor.apply import apply_tensor_parallel
from evermesh.parallelism.tensor.loss import cross_entropy
from evermesh.parallelism.tensor.tokens import pad_tokens, without_padding
from evermesh.runtime.memory.policy import recompute_activations
from evermesh.runtime.model.config import ModelConfig, MoeConfig
from evermesh.runtime.model.decoder import Decoder, keep_activations
from evermesh.runtime.model.experts import MixtureOfExperts
from evermesh.runtime.model.sharding import DECODER_EXPERTS, DECODER_SHARDING
from tests.cluster import run_ranks
from tests.oracle import gradient, plain_attention, relative_error

VOCABULARY, STEP, SEED = 31, 7, 5
LENGTHS = (23, 9, 1, 14, 6, 2)
Wave = list[tuple[int, tuple[int, ...]]]
WAVES: list[Wave] = [
    [(0, (0, 1)), (1, (0,)), (2, (1,))],  # a document on a ring, and packs beside it
    [(3, (1, 0))],
    [(4, (1,)), (5, (1,))],  # HDP rank 0 has no token
]
EXPERTS: dict[str, Any] = {"experts": 4, "ffn": 8, "top_k": 2, "first_dense_layers": 1}
MODES: dict[str, dict[str, Any]] = {
    "bias": {"balancing": {"kind": "bias", "rate": 0.01}, "router": "sigmoid", "shared_ffn": 12, "shared_gate": True},
    "document loss": {"balancing": {"kind": "document_loss", "coefficient": 0.7}},
    "capacity": {"capacity_factor": 0.8, "balancing": {"kind": "document_loss", "coefficient": 0.7}},
}


class Shape(NamedTuple):
    """How ranks are used: hdp x tp on the attention side, edp x ep x etp on that of the experts."""

    hdp: int
    tp: int
    ep: int
    etp: int


def _config(mode: str) -> ModelConfig:
    moe = MoeConfig.model_validate(EXPERTS | MODES[mode])
    return ModelConfig(hidden=16, layers=3, heads=2, kv_heads=2, ffn=24, initial_std=0.3, moe=moe)


def _model(mode: str) -> Decoder:
    model = Decoder(_config(mode), VOCABULARY)
    model.initialize(2)
    return model.double()


def _document(sequence: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (LENGTHS[sequence] + 1,), generator=torch.Generator().manual_seed(sequence))
    return tokens[:-1], tokens[1:]


def _context(micro_batch: MicroBatch, hdp: Communicator | None = None, tp: Communicator | None = None) -> TokenContext:
    identities = [f"corpus:{sequence}:0" for sequence in range(len(LENGTHS))]
    return TokenContext(
        micro_batch, LENGTHS, identities, sum(LENGTHS), STEP, SEED, hdp or Communicator(), tp or Communicator()
    )


class Result(NamedTuple):
    gradients: dict[str, Tensor]
    loss: float
    loads: list[list[int]]
    """By layer with experts."""
    traffic: tuple[Traffic, ...] = ()


@cache
def _expected(mode: str) -> Result:
    """Every document alone in one process."""
    model = _model(mode)
    loads = ExpertLoads((1, 2), 4, torch.device("cpu"))
    total = 0.0
    for sequence, length in enumerate(LENGTHS):
        tokens, targets = _document(sequence)
        context = _context(MicroBatch((Piece(sequence, ((0, length),), (0,)),)))
        logits = model(tokens, torch.arange(length), plain_attention, context=context)
        loss = F.cross_entropy(logits, targets, reduction="sum") / sum(LENGTHS)
        loss.backward()
        loads.add(context)
        total += loss.item() + sum(part.item() for part in context.losses.values())
    taken = loads.take()
    gradients = {name: gradient(parameter) for name, parameter in model.named_parameters()}
    return Result(gradients, total, taken.tolist())


def _micro_batch(wave: Wave, hdp_rank: int) -> MicroBatch:
    return MicroBatch(
        tuple(
            Piece(sequence, share_of(LENGTHS[sequence], len(ring), ring.index(hdp_rank)).ranges(), ring)
            for sequence, ring in wave
            if hdp_rank in ring
        )
    )


def _groups(rank: int, shape: Shape) -> dict[str, Communicator]:
    import torch.distributed as dist

    mesh, each = Mesh(shape.hdp, shape.tp), shape.ep * shape.etp
    axes = {
        "hdp": [list(ranks) for ranks in mesh.groups("hdp")],
        "tp": [list(ranks) for ranks in mesh.groups("tp")],
        "edp": [list(range(place, mesh.size, each)) for place in range(each)],
        "ep": [
            list(range(first + etp_rank, first + each, shape.etp))
            for first in range(0, mesh.size, each)
            for etp_rank in range(shape.etp)
        ],
        "etp": [list(range(first, first + shape.etp)) for first in range(0, mesh.size, shape.etp)],
    }
    found = {}
    for axis, groups in axes.items():
        for ranks in groups:
            group = dist.new_group(ranks) if len(ranks) > 1 else None
            if rank in ranks:
                found[axis] = Communicator(group, name=axis)
    return found


def _run(rank: int, world_size: int, mode: str, shape: Shape, recompute: bool) -> tuple[dict[str, Any], Result]:
    groups, model = _groups(rank, shape), _model(mode)
    hdp, tp = groups["hdp"], groups["tp"]
    cuts: dict[str, Any] = dict(apply_tensor_parallel(model, DECODER_SHARDING, tp))
    experts = apply_expert_parallel(model, DECODER_EXPERTS, groups["ep"], groups["etp"])
    ledger = ByteLedger()
    loads, total = ExpertLoads((1, 2), 4, torch.device("cpu")), torch.zeros((), dtype=torch.float64)
    for wave in WAVES:
        micro_batch = _micro_batch(wave, hdp.rank)
        parts = [(sequence, start, stop) for sequence, ranges in _ranges(micro_batch) for start, stop in ranges]
        none = torch.empty(0, dtype=torch.int64)
        tokens = torch.cat([none, *(_document(sequence)[0][start:stop] for sequence, start, stop in parts)])
        targets = torch.cat([none, *(_document(sequence)[1][start:stop] for sequence, start, stop in parts)])
        positions = torch.cat([none, *(torch.arange(start, stop) for _, start, stop in parts)])
        attend = MicroBatchAttention(micro_batch, LENGTHS, kernel_for(tokens.device, torch.float64), hdp)
        context = _context(micro_batch, hdp, tp)
        with hdp.listen(ledger), tp.listen(ledger):
            logits = model(
                pad_tokens(tokens, tp.size),
                pad_tokens(positions, tp.size),
                without_padding(attend, len(tokens)),
                run_block=recompute_activations if recompute else keep_activations,
                context=context,
            )[: len(tokens)]
            loss = cross_entropy(logits, targets, VOCABULARY, tp).sum() / sum(LENGTHS)
            loss.backward()
        loads.add(context)
        total += loss.detach() / tp.size + sum(context.losses.values())
    taken = loads.take(hdp, tp)
    for communicator in (hdp, tp):
        communicator.all_reduce(total, "loss")
    place = groups["ep"].rank * shape.etp + groups["etp"].rank
    held = {}
    for name, parameter in model.named_parameters():
        grad = gradient(parameter)
        if name in experts:
            groups["edp"].all_reduce(grad, "gradients")
            held[name] = experts[name], place, grad
            continue
        hdp.all_reduce(grad, "gradients")
        if cuts[name].dim is None:
            tp.all_reduce(grad, "gradients")
        held[name] = cuts[name], tp.rank, grad
    sent = tuple(part for part in ledger.take_step(0, "start-up") if part.call_site == "documents")
    return held, Result({}, total.item(), taken.tolist(), sent)


def _ranges(micro_batch: MicroBatch) -> list[tuple[int, tuple[tuple[int, int], ...]]]:
    return [(piece.sequence, piece.ranges) for piece in micro_batch.pieces]


def _check(mode: str, shape: Shape, *, recompute: bool = False) -> None:
    wanted, results = _expected(mode), run_ranks(shape.hdp * shape.tp, _run, mode, shape, recompute)
    whole: dict[str, Tensor] = {}
    for held, result in results:
        assert abs(result.loss - wanted.loss) <= 1e-12 * wanted.loss
        assert result.loads == wanted.loads
        for name, (cut, place, part) in held.items():
            target = whole.setdefault(name, torch.full(cut.shape, float("nan"), dtype=part.dtype))
            offsets, sizes = cut.offsets(place), cut.local_shape(place)
            box = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            assert target[box].isnan().all() or torch.equal(target[box], part), f"replicas of {name} differ"
            target[box] = part
    assert add_up(part for _, result in results for part in result.traffic) == _formula(mode, shape, recompute)
    assert whole.keys() == wanted.gradients.keys()
    errors = {name: relative_error(whole[name], wanted.gradients[name]) for name in whole}
    assert max(errors.values()) <= 1e-11, errors


def _formula(mode: str, shape: Shape, recompute: bool) -> tuple[Traffic, ...]:
    """What two layers exchange about documents."""
    parts: list[Traffic] = []
    for wave in WAVES:
        micro_batches = [_micro_batch(wave, hdp_rank) for hdp_rank in range(shape.hdp)]
        mesh, losses, capacity = Mesh(shape.hdp, shape.tp), mode != "bias", mode == "capacity"
        for _ in range(2 * (1 + recompute)):
            parts += document_traffic(
                micro_batches, LENGTHS, mesh, (0,) * mesh.size, (4, 2), losses=losses, capacity=capacity
            )
    return add_up(parts)


@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        ("bias", Shape(hdp=2, tp=2, ep=2, etp=2)),
        ("capacity", Shape(hdp=2, tp=2, ep=4, etp=1)),  # and the document loss
    ],
)
def test_gradients_losses_and_loads_equal_one_process(mode: str, shape: Shape) -> None:
    _check(mode, shape)


def test_recomputed_blocks_ask_for_their_documents_again() -> None:
    _check("capacity", Shape(hdp=2, tp=2, ep=2, etp=2), recompute=True)


@pytest.mark.parity
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape",
    [Shape(2, 1, 1, 1), Shape(2, 1, 2, 1), Shape(2, 2, 1, 1), Shape(2, 2, 4, 1), Shape(2, 2, 1, 4), Shape(2, 2, 2, 1)],
    ids=str,
)
def test_expert_gradients_on_the_wide_matrix(mode: str, shape: Shape, recompute: bool) -> None:
    _check(mode, shape, recompute=recompute)


SMALL = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}


def _small_mixture(dtype: str) -> tuple[MixtureOfExperts, Tensor]:
    """Sizes that the grouped kernel takes, also cut in two."""
    mixture = MixtureOfExperts(16, MoeConfig(experts=4, ffn=32), 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    mixture.router.double()  # the same choices in every type
    mixture.experts.to(getattr(torch, dtype))
    return mixture, torch.randn(24, 16, generator=generator).to(torch.bfloat16)


def _small_gradients(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    groups, results = _groups(rank, Shape(hdp=4, tp=1, ep=2, etp=2)), {}
    for dtype in SMALL:
        mixture, x = _small_mixture(dtype)
        sharding = ExpertSharding({"experts.gate": 1, "experts.up": 1, "experts.down": 2})
        apply_expert_parallel(mixture, sharding, groups["ep"], groups["etp"])
        own = x[6 * rank : 6 * rank + 6].to(getattr(torch, dtype)).requires_grad_()
        out = mixture(own)
        out.backward(torch.ones_like(out))
        results[dtype] = [out.detach(), gradient(own)]
    return results


def test_every_type_gives_on_ranks_what_float64_gives_alone() -> None:
    mixture, x = _small_mixture("float64")
    own = x.double().requires_grad_()
    out = mixture(own)
    out.backward(torch.ones_like(out))
    results = run_ranks(4, _small_gradients)
    for dtype, tolerance in SMALL.items():
        outs, grads = (torch.cat([of_rank[dtype][at] for of_rank in results]) for at in (0, 1))
        assert outs.dtype == grads.dtype == getattr(torch, dtype)
        assert relative_error(outs.double(), out.detach()) <= tolerance
        assert relative_error(grads.double(), gradient(own)) <= tolerance


def test_some_tokens_find_no_slot_and_which_ones_depends_on_step_and_seed_alone() -> None:
    model = _model("capacity")
    outs = []
    for changes in ({}, {"step": STEP}, {"step": STEP + 1}, {"seed": SEED + 1}, {"identities": ["x"] * len(LENGTHS)}):
        context = dataclasses.replace(_context(MicroBatch((Piece(0, ((0, 23),), (0,)),))), **changes)
        outs.append(model(_document(0)[0], torch.arange(23), plain_attention, context=context))
    assert torch.equal(outs[0], outs[1])
    assert all(not torch.equal(outs[0], other) for other in outs[2:])


def test_a_document_drops_the_same_tokens_alone_and_in_a_pack() -> None:
    model = _model("capacity")

    def logits(*sequences: int) -> Tensor:
        pieces = tuple(Piece(sequence, ((0, LENGTHS[sequence]),), (0,)) for sequence in sequences)
        tokens = torch.cat([_document(sequence)[0] for sequence in sequences])
        positions = torch.cat([torch.arange(LENGTHS[sequence]) for sequence in sequences])
        attend = MicroBatchAttention(
            MicroBatch(pieces), LENGTHS, kernel_for(tokens.device, torch.float64), Communicator()
        )
        return model(tokens, positions, attend, context=_context(MicroBatch(pieces)))

    packed = logits(3, 0, 5)
    alone = torch.cat([logits(3), logits(0), logits(5)])
    assert relative_error(packed.detach(), alone.detach()) <= 1e-12
