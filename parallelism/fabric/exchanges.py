"""What the groups of a job send in a step, rank to rank, by the formulas of the byte ledger; only groups that leave a node.

Left out is what is small whatever the model: norms, scalars, plans, tokens, documents, counts of experts, loads.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evermesh.parallelism.attention.traffic import AttentionSizes, sequence_messages
from evermesh.parallelism.batch_plan import BatchPlan, Piece
from evermesh.parallelism.fabric.expert_rows import copy_messages, expert_messages, sharing_experts
from evermesh.parallelism.links import Operation, wire_bytes
from evermesh.parallelism.tiers_traffic import alike, owned_collectives
from evermesh.parallelism.traffic import Choices, TrainedModel, owner_rounds, tensor_collectives

SMALL = (
    "norms",
    "scalars",
    "plan",
    "tokens",
    "documents",
    "loss weights",
    "expert counts",
    "expert loads",
    "calibration",
)
"""Call sites of the ledger that are left out."""


@dataclass(frozen=True, slots=True)
class Collective:
    """What a group does in a step with one operation."""

    call_site: str
    axis: str
    operation: Operation
    ranks: tuple[int, ...]
    calls: tuple[tuple[float, float], ...]
    """Payload bytes of every rank, and how often."""

    def wire_bytes(self, position: int) -> float:
        """What the rank at ``position`` sends on a ring in rank order."""
        n = len(self.ranks)
        return sum(times * wire_bytes(self.operation, int(payload), n, position) for payload, times in self.calls)

    def scaled(self, share: float) -> "Collective":
        """As if it were done so much as often."""
        return replace(self, calls=tuple((payload, times * share) for payload, times in self.calls))

    @property
    def payload_bytes(self) -> float:
        """Of all calls."""
        return sum(payload * times for payload, times in self.calls)


@dataclass(frozen=True, slots=True)
class Messages:
    """What single ranks send to others in a step."""

    call_site: str
    axis: str
    operation: Operation
    senders: NDArray[np.int64]
    receivers: NDArray[np.int64]
    num_bytes: NDArray[np.float64]

    def scaled(self, share: float) -> "Messages":
        """As if they were sent so much as often."""
        return replace(self, num_bytes=self.num_bytes * share)


Exchange = Collective | Messages
_Calls = dict[tuple[str, str, Operation, tuple[int, ...]], Counter[int]]
_Sent = dict[tuple[str, str, Operation], Counter[tuple[int, int]]]


def plan_exchanges(
    plan: BatchPlan, model: TrainedModel, nodes: Sequence[int], choices: Choices | None = None
) -> list[Exchange]:
    """What leaves nodes when a step runs this plan and ends in an update.

    Args:
        plan: the batch plan.
        model: what is trained.
        nodes: index of the node of every rank.
        choices: where tokens went, if it is known; without, every expert gets equally many, and none has copies.
    """
    plan = replace(plan, ranks=tuple(plan.ranks))  # unpacked once
    calls: _Calls = {}
    sent: _Sent = {}
    matrices = list[Messages]()
    for axis in ("hdp", "edp") if model.num_experts else ("hdp",):
        _owners(calls, axis, plan, model, nodes, choices)
    _tensor(calls, plan, model, nodes)
    _sequences(sent, plan, model)
    _pipelines(calls, sent, plan, model, nodes)
    if model.num_experts:
        matrices = [
            Messages(*key, *ends)
            for ranks, pp in sharing_experts(model, nodes)
            for key, ends in expert_messages(plan, model, pp, ranks, nodes, choices)
        ]
        for key, pair, num_bytes in copy_messages(model, choices):
            sent.setdefault(key, Counter())[pair] += num_bytes
    found: list[Exchange] = [
        Collective(*key, tuple((float(size), float(times)) for size, times in of_key.items()))
        for key, of_key in calls.items()
    ]
    for key, pairs in sent.items():
        ends = np.array(list(pairs), np.int64).reshape(-1, 2)
        found.append(Messages(*key, ends[:, 0], ends[:, 1], np.array(list(pairs.values()), float)))
    return [one for one in (_leaving(exchange, np.asarray(nodes)) for exchange in (*found, *matrices)) if one]


def _leaving(exchange: Exchange, nodes: NDArray[np.int64]) -> Exchange | None:
    if isinstance(exchange, Collective):
        return exchange
    leaves = (nodes[exchange.senders] != nodes[exchange.receivers]) & (exchange.num_bytes > 0)
    if not leaves.any():
        return None
    ends = exchange.senders[leaves], exchange.receivers[leaves]
    return Messages(exchange.call_site, exchange.axis, exchange.operation, *ends, exchange.num_bytes[leaves])


def _add(
    calls: _Calls, call_site: str, axis: str, operation: Operation, ranks: tuple[int, ...], size: int, times: int
) -> None:
    if size and times:
        calls.setdefault((call_site, axis, operation, ranks), Counter())[size] += times


def _leave_node(ranks: Sequence[int], nodes: Sequence[int]) -> bool:
    return any(nodes[rank] != nodes[ranks[0]] for rank in ranks)


def _owners(
    calls: _Calls, axis: str, plan: BatchPlan, model: TrainedModel, nodes: Sequence[int], choices: Choices | None
) -> None:
    """Gradients and parameters, among the ranks that hold the same."""
    layout = model.layout
    division = layout.division if axis == "hdp" else layout.expert_division
    for group in model.mesh.groups("hdp" if axis == "hdp" else "edp"):
        if not _leave_node(group, nodes):
            continue
        place = model.mesh.coordinates(group[0])
        copied = choices.placements[group[0]] if choices is not None else {}
        for sizes in model.stages[place.pp].sets:
            if sizes.of_experts == (axis == "hdp"):
                continue
            placement = copied.get(sizes.layer) if sizes.of_experts and sizes.layer is not None else None
            has_copies = placement is not None and bool(placement.copies)
            rounds = owner_rounds(sizes, model, len(plan.ranks[place.hdp]), has_copies=has_copies, committed=True)
            for one in owned_collectives(sizes, division, rounds, model.bytes_per_element):
                for places in division.groups(one.level):
                    ranks = tuple(group[at] for at in places)
                    if _leave_node(ranks, nodes):
                        _add(calls, one.call_site, axis, one.operation, ranks, one.payload_bytes, one.times)


def _tensor(calls: _Calls, plan: BatchPlan, model: TrainedModel, nodes: Sequence[int]) -> None:
    """Among the ranks that share a model."""
    for group in model.mesh.groups("tp"):
        if not _leave_node(group, nodes):
            continue
        place = model.mesh.coordinates(group[0])
        stage = model.stages[place.pp]
        for sizes in stage.sets:
            elements = 0 if sizes.of_experts else alike(sizes, model.layout.division, place.hdp)
            _add(calls, "gradients", "tp", "all_reduce", group, elements * model.gradient_bytes, 1)
        for micro_batch in plan.ranks[place.hdp]:
            repeats = micro_batch.recompute == "block"
            for site, operation, size in tensor_collectives(micro_batch.num_tokens, model, stage, recomputed=repeats):
                _add(calls, site, "tp", operation, group, size, 1)


def _sequences(sent: _Sent, plan: BatchPlan, model: TrainedModel) -> None:
    """Keys, values and heads of sequences that ranks share."""
    shared: dict[int, tuple[Piece, bool]] = {}
    for micro_batches in plan.ranks:
        for micro_batch in micro_batches:
            for piece in micro_batch.pieces:
                if len(piece.ring) > 1:
                    shared[piece.sequence] = piece, micro_batch.recompute == "block"
    mesh, known = model.mesh, dict[AttentionSizes, Counter[tuple[str, int, int]]]()
    for pp, stage in enumerate(model.stages):
        sizes = model.attention(stage)
        if sizes not in known:  # stages are mostly alike
            pairs = known[sizes] = Counter()
            for sequence, (piece, recomputed) in shared.items():
                for one in sequence_messages(plan.lengths[sequence], piece, sizes, recomputed=recomputed):
                    pairs[one.call_site, one.sender, one.receiver] += one.layers * one.num_bytes
        for (site, sender, receiver), num_bytes in known[sizes].items():
            of_site = sent.setdefault((site, "hdp", "send"), Counter())
            for tp in range(mesh.tp):
                of_site[mesh.rank(sender, tp, pp), mesh.rank(receiver, tp, pp)] += num_bytes


def _pipelines(calls: _Calls, sent: _Sent, plan: BatchPlan, model: TrainedModel, nodes: Sequence[int]) -> None:
    """Activations and their gradients between stages, and embeddings that are tied to a head in another stage."""
    schedule = model.layout.pipeline
    for group in model.mesh.groups("pp"):
        place = model.mesh.coordinates(group[0])
        tokens = sum(model.own_tokens(micro_batch.num_tokens) for micro_batch in plan.ranks[place.hdp])
        for stage in range(schedule.num_stages - 1):
            earlier, later = group[schedule.rank_of(stage)], group[schedule.rank_of(stage + 1)]
            if earlier != later and tokens:
                forward = sent.setdefault(("pipeline forward", "pp", "send"), Counter())
                backward = sent.setdefault(("pipeline backward", "pp", "send"), Counter())
                forward[earlier, later] += tokens * model.token_bytes
                backward[later, earlier] += tokens * model.token_bytes
        if model.tied_elements:
            ends = tuple(group[schedule.rank_of(stage)] for stage in (0, schedule.num_stages - 1))
            if _leave_node(ends, nodes):
                elements = model.tied_elements[place.tp]
                _add(calls, "tied embeddings", "pp", "all_reduce", ends, elements * model.gradient_bytes, 1)
                _add(calls, "tied embeddings", "pp", "broadcast", ends, elements * model.bytes_per_element, 1)


__all__ = ["SMALL", "Collective", "Exchange", "Messages", "plan_exchanges"]
