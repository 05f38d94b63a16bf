"""What the ranks send each other that share experts: rows of tokens to the experts that were chosen, and back."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.experts.placement import Placement
from evermesh.parallelism.experts.traffic import ExpertGroup, rows_sent
from evermesh.parallelism.links import Operation
from evermesh.parallelism.traffic import Choices, TrainedModel

Key = tuple[str, str, Operation]
"""Call site, axis, operation."""
Columns = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""Senders, receivers, bytes."""
_Matrix = NDArray[np.float64]


def sharing_experts(model: TrainedModel, nodes: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """The groups that share one set of experts and have ranks on several nodes, and the pipeline rank of each."""
    for pp in range(model.mesh.pp):
        for ranks in model.mesh.expert_holders(pp):
            if any(nodes[rank] != nodes[ranks[0]] for rank in ranks):
                yield ranks, pp


def expert_messages(
    plan: BatchPlan, model: TrainedModel, pp: int, ranks: Sequence[int], nodes: Sequence[int], choices: Choices | None
) -> Iterator[tuple[Key, Columns]]:
    """Of all layers and micro-batches of one group; without ``choices`` every expert gets equally many tokens."""
    stage, members = model.stages[pp], np.array(ranks, np.int64)
    totals: dict[Key, _Matrix] = {}
    for index, micro_batch in enumerate(plan.ranks[model.mesh.coordinates(ranks[0]).hdp]):
        for layer in stage.expert_layers:
            rows = _rows(plan, model, ranks, nodes, (index, layer), choices)
            over_ep, over_etp = _over(rows * model.token_bytes, model.layout.ep, model.layout.etp)
            repeats = micro_batch.recompute == "block" and layer in stage.repeated_experts
            for site, passes in (("expert forward", 1 + repeats), ("expert backward", 1)):
                of_ep: Key = (site, "ep", "all_to_all")
                of_etp: Key = (site, "etp", "send")
                totals[of_ep] = totals.get(of_ep, 0.0) + passes * over_ep
                totals[of_etp] = totals.get(of_etp, 0.0) + passes * over_etp
    for key, matrix in totals.items():
        senders, receivers = np.nonzero(matrix)
        yield key, (members[senders], members[receivers], matrix[senders, receivers])


def _rows(
    plan: BatchPlan,
    model: TrainedModel,
    ranks: Sequence[int],
    nodes: Sequence[int],
    at: tuple[int, int],
    choices: Choices | None,
) -> _Matrix:
    """By member, by EP rank: rows that go there, of the micro-batch and layer ``at``."""
    layout, (index, layer) = model.layout, at
    if choices is None:
        of_ranks = (plan.ranks[model.mesh.coordinates(rank).hdp] for rank in ranks)
        tokens = [model.own_tokens(of_one[index].num_tokens) if index < len(of_one) else 0 for of_one in of_ranks]
        return np.repeat(np.array(tokens, float)[:, None] * model.top_k / layout.ep, layout.ep, axis=1)
    placement = choices.placements[ranks[0]].get(layer, Placement(model.num_experts, layout.ep))
    group = ExpertGroup(placement, layout.etp, tuple(nodes[rank] for rank in ranks), model.token_bytes)
    return np.array(rows_sent([choices.routing[rank][index][layer] for rank in ranks], group), float)


def _over(sent: _Matrix, ep: int, etp: int) -> tuple[_Matrix, _Matrix]:
    """Bytes of one pass, member to member, over ep and over etp; ``sent`` by member, by EP rank."""
    over_ep, over_etp = np.zeros((2, ep * etp, ep * etp))
    for place in range(etp):
        members = np.arange(ep) * etp + place
        there = sent[members]
        over_ep[np.ix_(members, members)] = there + there.T  # and back
    arrived = sent.reshape(ep, etp, ep).sum(0)  # by etp rank, by EP rank that serves them
    for one, (a, b) in itertools.product(range(ep), itertools.permutations(range(etp), 2)):
        over_etp[one * etp + a, one * etp + b] = (
            arrived[a, one] + arrived[b, one]
        )  # its own rows, and outputs of the other
    np.fill_diagonal(over_ep, 0.0)
    return over_ep, over_etp


def copy_messages(model: TrainedModel, choices: Choices | None) -> Iterator[tuple[Key, tuple[int, int], int]]:
    """Weights of copied experts, and their gradients home: sender and receiver, bytes."""
    layout, elements = model.layout, 3 * model.expert_matrix_elements
    for pp, stage in enumerate(model.stages if choices is not None else ()):
        for ranks, layer in itertools.product(model.mesh.expert_holders(pp), stage.expert_layers):
            assert choices is not None
            placement = choices.placements[ranks[0]].get(layer, Placement(model.num_experts, layout.ep))
            for expert, holders in placement.copies.items():
                home = placement.owner(expert) * layout.etp
                for holder, etp_rank in itertools.product(holders, range(layout.etp)):
                    owner, copy = ranks[home + etp_rank], ranks[holder * layout.etp + etp_rank]
                    yield ("expert copies", "ep", "send"), (owner, copy), elements * model.bytes_per_element
                    yield ("expert copy gradients", "ep", "send"), (copy, owner), elements * model.gradient_bytes


__all__ = ["Columns", "Key", "copy_messages", "expert_messages", "sharing_experts"]
