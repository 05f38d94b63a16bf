"""A mixture of experts on real ranks, folded any way, and the same tokens in one process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evermesh.parallelism import Communicator, Moment
from evermesh.parallelism.experts import ExpertSharding, Placement
from evermesh.parallelism.experts.apply import apply_expert_parallel
from evermesh.parallelism.experts.dispatch import Dispatcher
from evermesh.parallelism.experts.hot import HotExperts
from evermesh.parallelism.ledger import ByteLedger, Traffic
from tests.oracle import gradient

CHANNELS, WIDTH, EXPERTS, CHOICES = 12, 8, 8, 3
SHARDING = ExpertSharding({"experts.up": 1, "experts.down": 2})


class Folding(NamedTuple):
    """Rank s of a stage is (edp_rank * ep + ep_rank) * etp + etp_rank."""

    etp: int
    ep: int
    edp: int

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(edp_rank, ep_rank, etp_rank) of ``rank``."""
        return rank // (self.etp * self.ep), rank // self.etp % self.ep, rank % self.etp


class _Experts(nn.Module):
    """Two layers with a nonlinearity; not those of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(_random(EXPERTS, WIDTH, CHANNELS, seed=1))
        self.down = nn.Parameter(_random(EXPERTS, CHANNELS, WIDTH, seed=2))

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        parts = zip(rows.split(list(counts)), self.up, self.down, strict=True)
        return torch.cat([(part @ up.T).tanh() @ down.T for part, up, down in parts])


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dispatcher, self.experts = Dispatcher(EXPERTS), _Experts()

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return self.dispatcher(x, chosen, weights, self.experts)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Tokens:
    """The tokens of one rank, what they chose, and the weights of the loss."""

    x: Tensor
    chosen: Tensor
    weights: Tensor
    loss_weights: Tensor


def tokens_of(rank: int, sizes: Sequence[int], zipf: float = 0.0) -> Tokens:
    """``sizes[rank]`` tokens; expert e is chosen in proportion to 1 / (e + 1)^zipf; some choices are of none."""
    size, generator = sizes[rank], torch.Generator().manual_seed(100 + rank)
    likely = (torch.arange(EXPERTS) + 1.0) ** -zipf
    chosen = (
        torch.multinomial(likely.expand(size, -1), CHOICES, generator=generator) if size else torch.empty(0, CHOICES)
    )
    chosen = chosen.long()
    if not zipf:
        chosen[torch.rand(chosen.shape, generator=generator) < 0.1] = -1
    x, weights = _random(size, CHANNELS, seed=200 + rank), _random(size, CHOICES, seed=300 + rank)
    return Tokens(x, chosen, weights, _random(size, CHANNELS, seed=400 + rank))


class Outcome(NamedTuple):
    """What a rank saw."""

    out: Tensor
    grad_x: Tensor
    grad_weights: Tensor
    parameters: dict[str, tuple[Any, Tensor]]
    """By name: the cut, and this rank's gradient, summed over edp."""
    traffic: tuple[Traffic, ...]
    rows: int
    """Rows that its experts saw."""


@cache
def expected(
    sizes: tuple[int, ...], zipf: float = 0.0
) -> tuple[list[Tensor], list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Outputs, gradients of tokens and of weights, by rank, and of parameters: one token, one choice at a time."""
    mixture, of_ranks = Mixture(), [tokens_of(rank, sizes, zipf) for rank in range(len(sizes))]
    outs, xs, weights = [], [], []
    for tokens in of_ranks:
        x, weight = tokens.x.clone().requires_grad_(), tokens.weights.clone().requires_grad_()
        out = 0 * x + 0 * weight.sum()
        for t, k in ((t, k) for t in range(len(x)) for k in range(CHOICES) if tokens.chosen[t, k] >= 0):
            up, down = mixture.experts.up[tokens.chosen[t, k]], mixture.experts.down[tokens.chosen[t, k]]
            one = torch.zeros(len(x), 1, dtype=torch.float64)
            one[t] = 1
            out = out + one * weight[t, k] * ((up @ x[t]).tanh() @ down.T)
        (out * tokens.loss_weights).sum().backward()
        outs.append(out.detach())
        xs.append(gradient(x))
        weights.append(gradient(weight))
    return outs, xs, weights, {name: gradient(parameter) for name, parameter in mixture.named_parameters()}


def run_folded(
    rank: int,
    world_size: int,
    folding: Folding,
    sizes: Sequence[int],
    copies: Mapping[int, tuple[int, ...]] | None = None,
    zipf: float = 0.0,
    nodes: tuple[int, ...] | None = None,
    recompute: bool = False,
) -> Outcome:
    """Forward and backward of the tokens of ``rank``; ``copies`` of hot experts, on every EP group alike."""
    from torch.utils.checkpoint import checkpoint

    edp, ep, etp = _groups(rank, world_size, folding, nodes or (0,) * world_size)
    mixture, seen = Mixture(), [0]
    cuts = apply_expert_parallel(mixture, SHARDING, ep, etp)
    mixture.dispatcher.hooks["before_experts"].append(lambda rows: seen.__setitem__(0, rows.shape[0]) or rows)
    tokens, hot, ledger = tokens_of(rank, sizes, zipf), HotExperts(mixture, ep), ByteLedger()
    x, weights = tokens.x.clone().requires_grad_(), tokens.weights.clone().requires_grad_()
    with ep.listen(ledger), etp.listen(ledger):
        if copies is not None:
            hot.begin_step(dict.fromkeys(hot.names, Placement(EXPERTS, folding.ep, copies)))
        if recompute:
            out = checkpoint(mixture, x, tokens.chosen, weights, use_reentrant=False)
        else:
            out = mixture(x, tokens.chosen, weights)
        (out * tokens.loss_weights).sum().backward()
        hot.end_step()
    parameters = {}
    for name, parameter in mixture.named_parameters():
        edp.all_reduce(gradient(parameter), "gradients")
        parameters[name] = cuts[name], gradient(parameter)
    traffic = ledger.take_step(0, "start-up")
    return Outcome(out.detach(), gradient(x), gradient(weights), parameters, traffic, seen[0])


def _groups(
    rank: int, world_size: int, folding: Folding, nodes: tuple[int, ...]
) -> tuple[Communicator, Communicator, Communicator]:
    """Communicators of this rank over edp, ep and etp; every rank makes every group, in one order."""
    import torch.distributed as dist

    found, moment = [], Moment()
    for axis, name in enumerate(("edp", "ep", "etp")):
        groups: dict[tuple[int, ...], list[int]] = {}
        for other in range(world_size):
            coordinates = folding.coordinates(other)
            groups.setdefault(coordinates[:axis] + coordinates[axis + 1 :], []).append(other)
        made = {tuple(ranks): dist.new_group(ranks) if len(ranks) > 1 else None for ranks in groups.values()}
        own = next(ranks for ranks in made if rank in ranks)
        at = tuple(nodes[other] for other in own)
        found.append(Communicator(made[own], name=name, nodes=at, moment=moment))
    return found[0], found[1], found[2]


def joined(outcomes: Sequence[Outcome], folding: Folding) -> dict[str, Tensor]:
    """The whole gradients from what all ranks hold; ranks of an edp group hold the same."""
    whole: dict[str, Tensor] = {}
    for rank, outcome in enumerate(outcomes):
        _, ep_rank, etp_rank = folding.coordinates(rank)
        for name, (cut, part) in outcome.parameters.items():
            target = whole.setdefault(name, torch.full(cut.shape, float("nan"), dtype=part.dtype))
            place = ep_rank * folding.etp + etp_rank
            box = tuple(slice(o, o + s) for o, s in zip(cut.offsets(place), cut.local_shape(place), strict=True))
            assert target[box].isnan().all() or torch.equal(target[box], part), f"replicas of {name} differ"
            target[box] = part
    return whole
