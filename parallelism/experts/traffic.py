"""What a mixture of experts sends, by formula from how tokens chose: the ledger must show exactly this.

Nothing here looks at the code that communicates. Ranks of the group are numbered ``ep_rank * etp + etp_rank``.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evermesh.parallelism.batch_plan import MicroBatch
from evermesh.parallelism.experts.placement import Placement
from evermesh.parallelism.ledger import Traffic, collective_traffic
from evermesh.parallelism.links import Operation, Tier, tiers_from, wire_bytes
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.tensor.sharding import padded_length

HDP_AXIS, TENSOR_AXIS, EP_AXIS, ETP_AXIS = "hdp", "tp", "ep", "etp"


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """The ranks that share the experts of a layer, and how."""

    placement: Placement
    """Of the experts on the EP ranks."""
    etp: int
    nodes: tuple[int, ...]
    """Index of the node of every rank of the group."""
    row_bytes: int
    """Of the activations of one token."""

    def rank(self, ep_rank: int, etp_rank: int) -> int:
        """The rank of the group at these coordinates."""
        return ep_rank * self.etp + etp_rank

    def tier(self, sender: int, receiver: int) -> Tier:
        """Tier of a link of the group."""
        return tiers_from(sender, self.nodes)[receiver]


def expert_traffic(
    counts: Sequence[Sequence[int]], group: ExpertGroup, *, recomputed: bool = False, backward: bool = True
) -> Iterator[Traffic]:
    """What one layer sends for the tokens of one micro-batch of every rank, forward and backward.

    A row goes to the rank that serves its expert and its output comes back; over etp every rank sends the rows that it
    has to the others, and each of them its part of the outputs. Backward, each is the other.

    Args:
        counts: by rank of the group, by expert: how many of its tokens were sent to it (dropped ones were not).
        group: the ranks.
        recomputed: whether the forward pass is run again.
        backward: whether there is a backward pass.
    """
    passes = [("expert forward", 1 + recomputed), ("expert backward", 1)][: 1 + backward]
    for _ in range(1 + recomputed):
        yield from _counts(group)
    rows = rows_sent(counts, group)
    for call_site, times in passes:
        for _ in range(times):
            yield from _over_ep(rows, group, call_site)
            yield from _over_etp(rows, group, call_site)


def copy_traffic(
    group: ExpertGroup, expert_bytes: Sequence[int], gradient_bytes: Sequence[int] | None = None
) -> Iterator[Traffic]:
    """What the copies of hot experts cost in a step: weights out, gradients home.

    ``expert_bytes`` of one rank's part of one expert, by parameter; ``gradient_bytes`` where these are others.
    """
    both = list(zip(expert_bytes, gradient_bytes or expert_bytes, strict=True))
    for expert, holders in group.placement.copies.items():
        owner = group.placement.owner(expert)
        for holder, etp_rank, (weight_bytes, num_bytes) in itertools.product(holders, range(group.etp), both):
            home, away = group.rank(owner, etp_rank), group.rank(holder, etp_rank)
            yield _message("expert copies", EP_AXIS, home, away, weight_bytes, group)
            yield _message("expert copy gradients", EP_AXIS, away, home, num_bytes, group)


def document_traffic(
    wave: Sequence[MicroBatch],
    lengths: Sequence[int],
    mesh: Mesh,
    nodes: Sequence[int],
    sizes: tuple[int, int],
    *,
    buckets: Sequence[int] = (),
    losses: bool,
    capacity: bool,
) -> Iterator[Traffic]:
    """What one layer sends in one forward pass so that documents are balanced as wholes.

    For the loss of a document its ranks exchange how often each expert was chosen, for capacity what every token chose.

    Args:
        wave: the micro-batch of every HDP rank.
        lengths: tokens of every sequence of the batch.
        mesh: the ranks.
        nodes: index of the node of every rank.
        sizes: experts of a layer, and how many a token passes through.
        buckets: numbers of tokens that micro-batches are padded to.
        losses: whether documents have a loss.
        capacity: whether documents have a capacity.
    """
    experts, per_token = sizes
    for hdp_rank, micro_batch in enumerate(wave):
        row = [nodes[rank] for rank in mesh.holders(0)[hdp_rank]]
        own_tokens = padded_length(micro_batch.num_tokens, mesh.tp, buckets) // mesh.tp
        counts_bytes, choices_bytes = len(micro_batch.pieces) * experts * 8, own_tokens * per_token * 4
        if mesh.tp > 1 and losses and counts_bytes:
            yield from collective_traffic("documents", "all_reduce", TENSOR_AXIS, counts_bytes, row)
        if mesh.tp > 1 and capacity and choices_bytes:
            yield from collective_traffic("documents", "all_gather", TENSOR_AXIS, choices_bytes, row)
        for piece, tp_rank in itertools.product(micro_batch.pieces, range(mesh.tp)):
            share = share_of(lengths[piece.sequence], len(piece.ring), piece.ring.index(hdp_rank))
            payloads = experts * 8 * losses, share.num_tokens * per_token * 4 * capacity
            for other, num_bytes in itertools.product(set(piece.ring) - {hdp_rank}, payloads):
                sender, receiver = mesh.rank(hdp_rank, tp_rank), mesh.rank(other, tp_rank)
                if num_bytes:
                    tier = tiers_from(sender, nodes)[receiver]
                    yield Traffic("documents", "send", HDP_AXIS, tier, num_bytes, num_bytes, 1)


def rows_sent(counts: Sequence[Sequence[int]], group: ExpertGroup) -> list[list[int]]:
    """By rank of the group, by EP rank: the rows that go there; ``counts`` as for ``expert_traffic``."""
    ep, rows = group.placement.ranks, []
    for ep_rank, etp_rank in itertools.product(range(ep), range(group.etp)):
        nodes = [group.nodes[group.rank(other, etp_rank)] for other in range(ep)]
        targets = group.placement.targets(ep_rank, nodes)
        own = counts[group.rank(ep_rank, etp_rank)]
        rows.append([sum(n for n, target in zip(own, targets, strict=True) if target == other) for other in range(ep)])
    return rows


def _counts(group: ExpertGroup) -> Iterator[Traffic]:
    ep, payload_bytes = group.placement.ranks, 8 * group.placement.most_held
    for etp_rank in range(group.etp if ep > 1 else 0):
        members = [group.rank(ep_rank, etp_rank) for ep_rank in range(ep)]
        payloads = [[payload_bytes] * ep] * ep
        yield from _all_to_all("expert counts", members, payloads, group)
    for ep_rank in range(ep if group.etp > 1 else 0):
        nodes = [group.nodes[group.rank(ep_rank, etp_rank)] for etp_rank in range(group.etp)]
        for etp_rank in range(group.etp):
            operation: Operation = "all_gather"
            sent = wire_bytes(operation, ep * payload_bytes, group.etp, etp_rank)
            tier = tiers_from(etp_rank, nodes)[(etp_rank + 1) % group.etp]
            yield Traffic("expert counts", operation, ETP_AXIS, tier, ep * payload_bytes, sent, 1)


def _over_ep(rows: Sequence[Sequence[int]], group: ExpertGroup, call_site: str) -> Iterator[Traffic]:
    ep = group.placement.ranks
    for etp_rank in range(group.etp if ep > 1 else 0):
        members = [group.rank(ep_rank, etp_rank) for ep_rank in range(ep)]
        there = [[rows[member][other] * group.row_bytes for other in range(ep)] for member in members]
        back = [[there[other][own] for other in range(ep)] for own in range(ep)]
        yield from _all_to_all(call_site, members, there, group)
        yield from _all_to_all(call_site, members, back, group)


def _over_etp(rows: Sequence[Sequence[int]], group: ExpertGroup, call_site: str) -> Iterator[Traffic]:
    for ep_rank in range(group.placement.ranks):
        arrived = [
            sum(rows[group.rank(source, etp_rank)][ep_rank] for source in range(group.placement.ranks))
            * group.row_bytes
            for etp_rank in range(group.etp)
        ]
        for sender, receiver in itertools.permutations(range(group.etp), 2):
            ends = group.rank(ep_rank, sender), group.rank(ep_rank, receiver)
            for num_bytes in (arrived[sender], arrived[receiver]):  # its own rows, and its part of the other's outputs
                if num_bytes:
                    yield _message(call_site, ETP_AXIS, *ends, num_bytes, group)


def _all_to_all(
    call_site: str, members: Sequence[int], payloads: Sequence[Sequence[int]], group: ExpertGroup
) -> Iterator[Traffic]:
    """``payloads[i][j]`` bytes from member i to member j; one operation for every tier that a member's links have."""
    for sender, of_sender in zip(members, payloads, strict=True):
        sent: dict[Tier, int] = {}
        for receiver, num_bytes in zip(members, of_sender, strict=True):
            if receiver != sender:
                tier = group.tier(sender, receiver)
                sent[tier] = sent.get(tier, 0) + num_bytes
        for tier, num_bytes in sent.items():
            yield Traffic(call_site, "all_to_all", EP_AXIS, tier, num_bytes, num_bytes, 1)


def _message(call_site: str, axis: str, sender: int, receiver: int, num_bytes: int, group: ExpertGroup) -> Traffic:
    return Traffic(call_site, "send", axis, group.tier(sender, receiver), num_bytes, num_bytes, 1)
