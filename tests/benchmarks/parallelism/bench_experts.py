"""Tokens to experts and back: against a plain mixture written with torch alone, folded otherwise, and with hot experts."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evermesh.parallelism import Communicator
from evermesh.parallelism.experts import ExpertSharding, HotBudget, Placement, choose_hot
from evermesh.parallelism.experts.apply import apply_expert_parallel
from evermesh.parallelism.experts.dispatch import Dispatcher
from evermesh.parallelism.experts.hot import HotExperts
from evermesh.parallelism.experts.traffic import ExpertGroup, copy_traffic, expert_traffic
from evermesh.runtime.model.experts import Experts
from tests.benchmarks.harness import Row, exact_row, paired_row
from tests.cluster import run_ranks

RANKS, TOKENS, HIDDEN, WIDTH, EXPERTS, CHOICES, ROUNDS = 4, 1024, 256, 256, 16, 2, 15
SHARDING = ExpertSharding({"experts.gate": 1, "experts.up": 1, "experts.down": 2})
BIG_RANKS, BIG_EXPERTS, BIG_TOKENS, BIG_CHOICES = 8, 64, 4096, 6
"""Of what is computed by formula, which tests show to equal the ledger."""
BIG_HIDDEN, BIG_WIDTH, BYTES = 2048, 1408, 2


def run() -> list[Row]:
    """Times of a layer forward and backward on real ranks; bytes by formula."""
    rows = []
    for routing, zipf in (("even", 0.0), ("Zipf 1.2", 1.2)):
        for what, other in (("plain all-to-all mixture in torch", _plain), ("without copies", _folded)):
            if (what == "without copies") != (zipf > 0):
                continue
            ours = _hot if zipf else _folded
            times = run_ranks(RANKS, _paired, zipf, ours, other, timeout_s=300)
            own, peer = ([max(of_rank[side][i] for of_rank in times) for i in range(ROUNDS)] for side in (0, 1))
            name = f"layer forward and backward, {routing} routing, ep {RANKS}" + (", hot copies" if zipf else "")
            rows.append(paired_row(name, own, "s", peer=what, peer_values=peer))
    return rows + _bytes_of_foldings() + _bytes_of_gathers() + _hot_by_formula()


class _Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dispatcher, self.experts = Dispatcher(EXPERTS), Experts(EXPERTS, HIDDEN, WIDTH)


Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def _paired(rank: int, world_size: int, zipf: float, *makers: Callable[[int, Tensor], Step]) -> list[list[float]]:
    """Seconds of every round, of both in turn; outputs and gradients of both agree."""
    import torch.distributed as dist

    x, chosen, weights = _tokens(rank, zipf)
    steps = [make(world_size, chosen) for make in makers]
    results = [_gradient_of(step, x, chosen, weights) for step in steps]
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*results, strict=True))
    times: list[list[float]] = [[] for _ in steps]
    for round_ in range(ROUNDS):
        for index in (range(len(steps)), reversed(range(len(steps))))[round_ % 2]:
            dist.barrier()
            started_s = time.perf_counter()
            _gradient_of(steps[index], x, chosen, weights)
            times[index].append(time.perf_counter() - started_s)
    return times


def _tokens(rank: int, zipf: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    likely = ((torch.arange(EXPERTS) + 1.0) ** -zipf).expand(TOKENS, -1)
    chosen = torch.multinomial(likely, CHOICES, generator=generator)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    return x, chosen, torch.rand(TOKENS, CHOICES, generator=generator)


def _gradient_of(step: Step, x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = step(x, chosen, weights)
    assert x.grad is not None
    return out.detach(), x.grad


def _folded(world_size: int, _: Tensor) -> Step:
    mixture = _mixture()[0]

    def step(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = mixture.dispatcher(x, chosen, weights, mixture.experts)
        out.square().mean().backward()
        return out

    return step


def _hot(world_size: int, chosen: Tensor) -> Step:
    """Copies go out before and gradients come home after every layer, with nothing to hide behind."""
    mixture, ep = _mixture()
    hot = HotExperts(mixture, ep)
    counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
    ep.all_reduce(counts, "loads")
    budget = HotBudget(expert_bytes=1, memory_bytes=4, hidden_s=6.0, bytes_per_s=1.0)  # two of them
    placement = choose_hot([counts.tolist()], ep.size, ep.nodes, budget).placement

    def step(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        hot.begin_step(dict.fromkeys(hot.names, placement))
        out = mixture.dispatcher(x, chosen, weights, mixture.experts)
        out.square().mean().backward()
        hot.end_step()
        return out

    return step


def _mixture() -> tuple[_Mixture, Communicator]:
    import torch.distributed as dist

    mixture, ep = _Mixture(), Communicator(dist.group.WORLD, name="ep")
    apply_expert_parallel(mixture, SHARDING, ep, Communicator(name="etp"))
    return mixture, ep


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        import torch.distributed as dist

        ctx.sent, ctx.received = sent, received
        out = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), list(received), list(sent))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _AllToAll.apply(grads[0], ctx.received, ctx.sent), None, None


def _plain(world_size: int, _: Tensor) -> Step:
    """What a tutorial writes: sort, all-to-all, one expert after the other, all-to-all, ``index_add``."""
    import torch.distributed as dist

    whole, block, rank = _Mixture().experts, EXPERTS // world_size, dist.get_rank()
    own = slice(rank * block, (rank + 1) * block)
    gate, up, down = (nn.Parameter(w.detach()[own].clone()) for w in (whole.gate, whole.up, whole.down))

    def step(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        token = order // CHOICES
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
        incoming = torch.empty_like(counts)
        dist.all_to_all_single(incoming, counts)
        sent, received = counts.view(world_size, -1).sum(1).tolist(), incoming.view(world_size, -1).sum(1).tolist()
        rows = _AllToAll.apply(x[token], sent, received)
        expert = torch.arange(block).repeat(world_size).repeat_interleave(incoming)
        out = torch.zeros_like(rows)
        for e in range(block):
            at = (expert == e).nonzero().squeeze(1)
            inner = F.silu(rows[at] @ gate[e].T) * (rows[at] @ up[e].T)
            out = out.index_add(0, at, inner @ down[e].T)
        back = _AllToAll.apply(out, received, sent)
        result = torch.zeros_like(x).index_add(0, token, back * weights.flatten()[order].unsqueeze(1))
        result.square().mean().backward()
        return result

    return step


def _big_counts(zipf: float) -> list[list[int]]:
    """By rank, how many of its tokens choose each expert."""
    generator = torch.Generator().manual_seed(1)
    likely = ((torch.randperm(BIG_EXPERTS, generator=generator) + 1.0) ** -zipf).expand(BIG_TOKENS, -1)
    chosen = [torch.multinomial(likely, BIG_CHOICES, generator=generator) for _ in range(BIG_RANKS)]
    return [torch.bincount(of_rank.flatten(), minlength=BIG_EXPERTS).tolist() for of_rank in chosen]


def _group(ep: int, placement: Placement | None = None) -> ExpertGroup:
    nodes = (0,) * BIG_RANKS
    return ExpertGroup(placement or Placement(BIG_EXPERTS, ep), BIG_RANKS // ep, nodes, BIG_HIDDEN * BYTES)


def _bytes_of_foldings() -> list[Row]:
    sent = {}
    for ep in (8, 4, 2, 1):
        sent[ep] = sum(part.wire_bytes for part in expert_traffic(_big_counts(0.0), _group(ep)))
    return [
        exact_row(
            f"bytes of a layer, ep {ep} x etp {BIG_RANKS // ep}, {BIG_TOKENS} tokens x {BIG_RANKS} ranks (formula)",
            sent[ep],
            "bytes",
            peer="ep 1 x etp 8",
            peer_value=sent[1],
        )
        for ep in sent
    ]


def _bytes_of_gathers() -> list[Row]:
    """What a gather over etp 2 sends exactly, and padded to the longest, when ranks hold 1/8, 2/8, ... of the tokens."""
    counts, ep = [[n * (rank + 1) // 8 for n in of_rank] for rank, of_rank in enumerate(_big_counts(1.2))], 4
    exact = padded = 0
    for ep_rank in range(ep):
        block = range(ep_rank * BIG_EXPERTS // ep, (ep_rank + 1) * BIG_EXPERTS // ep)
        arrived = [
            sum(counts[source * 2 + etp_rank][expert] for source in range(ep) for expert in block)
            for etp_rank in (0, 1)
        ]
        exact, padded = exact + sum(arrived), padded + 2 * max(arrived)
    what = "rows gathered over etp 2, 1/8 to 8/8 of the tokens on a rank (formula)"
    return [exact_row(what, exact, "rows", peer="padded to the longest", peer_value=padded)]


def _hot_by_formula() -> list[Row]:
    rows, counts = [], _big_counts(1.2)
    totals = [float(sum(of_expert)) for of_expert in zip(*counts, strict=True)]
    expert_bytes = 3 * BIG_HIDDEN * BIG_WIDTH * BYTES
    plain_load, plain_bytes = _load(counts, Placement(BIG_EXPERTS, BIG_RANKS)), _moved(counts, _group(BIG_RANKS))
    for hot in (1, 2, 4, 8):
        budget = HotBudget(expert_bytes, 2 * hot * expert_bytes, hidden_s=float(hot), bytes_per_s=7 * expert_bytes)
        placement = choose_hot([totals], BIG_RANKS, (0,) * BIG_RANKS, budget).placement
        copies = sum(part.wire_bytes for part in copy_traffic(_group(BIG_RANKS, placement), [expert_bytes]))
        what = f"{hot} of {BIG_EXPERTS} experts hot, Zipf 1.2: "
        load, moved = _load(counts, placement), _moved(counts, _group(BIG_RANKS, placement))
        peer = "no copies"
        rows.append(
            exact_row(what + "rows of the busiest rank over the mean", load, "", peer=peer, peer_value=plain_load)
        )
        rows.append(exact_row(what + "bytes of rows", moved, "bytes", peer=peer, peer_value=plain_bytes))
        rows.append(exact_row(what + "bytes of copies, once a step", copies, "bytes"))
    return rows


def _moved(counts: Sequence[Sequence[int]], group: ExpertGroup) -> int:
    return sum(part.wire_bytes for part in expert_traffic(counts, group) if part.call_site != "expert counts")


def _load(counts: Sequence[Sequence[int]], placement: Placement) -> float:
    """Rows of the busiest rank over the mean."""
    rows, nodes = [0] * placement.ranks, (0,) * placement.ranks
    for rank, of_rank in enumerate(counts):
        for number, target in zip(of_rank, placement.targets(rank, nodes), strict=True):
            rows[target] += number
    return max(rows) / (sum(rows) / len(rows))
