"""What the page shows at one moment: sections of named fields, shaped from the status of a job.

What there is one of for every rank or node is a column, a list: at 12,288 ranks a list of numbers is a tenth of as many
objects, and a column that has not changed is not sent again. All of it is JSON, and every number is finite.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from evermesh.launcher.controller.status import JobStatus, NodeStatus, RankStatus
from evermesh.launcher.dashboard.delays import delays_of
from evermesh.launcher.finite import finite

Section = Mapping[str, Any]
Board = Mapping[str, Section]

RANK_STATES: tuple[str, ...] = get_args(RankStatus.model_fields["state"].annotation)
_OWN = {"nodes", "ranks", "findings", "delays"}
"""Fields of a status that have sections of their own."""
_MIB = 1 << 20


def board_of(status: JobStatus) -> Board:
    """The sections ``job``, ``nodes``, ``ranks``, ``findings`` and ``delays``."""
    return {
        "job": finite(status.model_dump(mode="json", exclude=_OWN)),
        "nodes": _nodes(status.nodes),
        "ranks": _ranks(status.ranks, {node.node: number for number, node in enumerate(status.nodes)}),
        "findings": {"found": [finite(finding.model_dump(mode="json")) for finding in status.findings]},
        "delays": delays_of(status),
    }


def changes(before: Board, now: Board) -> dict[str, dict[str, Any]]:
    """The fields of ``now`` that differ from ``before``, by section; sections that do not differ are left out."""
    found = {}
    for name, section in now.items():
        old = before.get(name, {})
        changed = {field: value for field, value in section.items() if field not in old or old[field] != value}
        if changed:
            found[name] = changed
    return found


def _nodes(nodes: Sequence[NodeStatus]) -> Section:
    """Memory in MiB and leases in tenths of a second: nobody needs to know that they changed by less."""
    return {
        "node": [node.node for node in nodes],
        "host": [node.host or node.address for node in nodes],
        "state": [node.state for node in nodes],
        "is_spare": [node.is_spare for node in nodes],
        "known_as": [node.known_as for node in nodes],
        "aside": [node.aside for node in nodes],
        "first_rank": [min(node.ranks, default=None) for node in nodes],
        "num_ranks": [len(node.ranks) for node in nodes],
        "lease_left_s": [None if node.lease_left_s is None else round(node.lease_left_s, 1) for node in nodes],
        "memory_free_mib": [_mib(node.memory_free_bytes) for node in nodes],
        "shared_memory_mib": [_mib(node.shared_memory_bytes) for node in nodes],
        "snapshot_mib": [_mib(node.snapshot_bytes) for node in nodes],
    }


def _ranks(ranks: Sequence[RankStatus], place: Mapping[str, int]) -> Section:
    """``node`` and ``state`` are places in the names of the nodes and in ``states``; times are whole microseconds."""
    number = {state: index for index, state in enumerate(RANK_STATES)}
    return {
        "states": RANK_STATES,
        "rank": [rank.rank for rank in ranks],
        "node": [place.get(rank.node) for rank in ranks],
        "pid": [rank.pid for rank in ranks],
        "state": [number[rank.state] for rank in ranks],
        "step": [rank.step for rank in ranks],
        "step_us": [_microseconds(rank.step_s) for rank in ranks],
        "compute_us": [_microseconds(rank.compute_s) for rank in ranks],
    }


def _microseconds(seconds: float | None) -> int | None:
    return None if seconds is None or not math.isfinite(seconds) else round(1e6 * seconds)


def _mib(num_bytes: int | None) -> int | None:
    return None if num_bytes is None else num_bytes // _MIB
