"""The traffic of a training step: counted by the ledgers of all ranks, and by formula.

Everything that a step sends is in both, with one exception: the ``all_reduce`` that adds up the counts themselves
(call site ``bookkeeping``). Batch plans count for the step that they are made for, although they are sent before it.
"""

from collections.abc import Sequence

import torch

from evermesh.parallelism.batch_plan import DIGEST_BYTES, BatchPlan
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.ledger import Cell, Traffic, add_up
from evermesh.parallelism.links import TIERS, Operation
from evermesh.parallelism.traffic import TrainedModel, collective_traffic, plan_traffic

OPERATIONS: tuple[tuple[str, Operation, str], ...] = (
    ("ring forward", "send", "hdp"),
    ("ring backward", "send", "hdp"),
    ("ring gradients", "send", "hdp"),
    ("tensor forward", "all_gather", "tp"),
    ("tensor forward", "reduce_scatter", "tp"),
    ("tensor backward", "all_gather", "tp"),
    ("tensor backward", "reduce_scatter", "tp"),
    ("pipeline forward", "send", "pp"),
    ("pipeline backward", "send", "pp"),
    ("tied embeddings", "all_reduce", "pp"),
    ("tied embeddings", "broadcast", "pp"),
    ("documents", "send", "hdp"),
    ("documents", "all_gather", "tp"),
    ("documents", "all_reduce", "tp"),
    ("expert counts", "all_to_all", "ep"),
    ("expert counts", "all_gather", "etp"),
    ("expert forward", "all_to_all", "ep"),
    ("expert forward", "send", "etp"),
    ("expert backward", "all_to_all", "ep"),
    ("expert backward", "send", "etp"),
    ("expert loads", "all_reduce", "world"),
    ("loss", "all_reduce", "tp"),
    ("gradients", "all_reduce", "hdp"),
    ("gradients", "all_reduce", "tp"),
    ("gradients", "all_reduce", "edp"),
    ("parameters", "all_gather", "hdp"),
    ("parameters", "all_gather", "edp"),
    ("scalars", "all_reduce", "world"),
    ("plan", "broadcast", "control"),
    ("loss weights", "all_reduce", "control"),
)
"""Call site, operation and axis of everything that a training step sends."""
_CELLS: tuple[Cell, ...] = tuple((*operation, tier) for operation in OPERATIONS for tier in TIERS)
_ROWS = {cell: row for row, cell in enumerate(_CELLS)}


def over_all_ranks(own: Sequence[Traffic], world: Communicator, device: torch.device) -> tuple[Traffic, ...]:
    """The traffic of one step, summed over the ranks. Collective: one small ``all_reduce``."""
    counts = torch.zeros(len(_CELLS), 3, dtype=torch.int64)
    for traffic in own:
        counts[_ROWS[traffic.cell]] = torch.tensor(traffic.counts)
    counts = counts.to(device)
    world.all_reduce(counts, "bookkeeping")
    summed = (Traffic(*cell, *count) for cell, count in zip(_CELLS, counts.tolist(), strict=True))
    return tuple(sorted(traffic for traffic in summed if traffic.calls))


def payload_bytes(traffic: Sequence[Traffic], call_site: str) -> int:
    """Payload of everything that was sent for ``call_site``."""
    return sum(part.payload_bytes for part in traffic if part.call_site == call_site)


def step_traffic(
    plan: BatchPlan, model: TrainedModel, nodes: Sequence[int], *, committed: bool = True
) -> tuple[Traffic, ...]:
    """What a training step with this plan sends over all ranks; arguments as for ``plan_traffic``."""
    plan_bytes = DIGEST_BYTES + len(plan.to_json())
    parts = list(plan_traffic(plan, model, nodes, committed=committed))
    parts += collective_traffic("scalars", "all_reduce", "world", 3 * 8, nodes)
    parts += collective_traffic("plan", "broadcast", "control", 8, nodes)  # how long it is
    parts += collective_traffic("plan", "broadcast", "control", plan_bytes, nodes)
    parts += collective_traffic("loss weights", "all_reduce", "control", 8, nodes)
    return add_up(parts)
