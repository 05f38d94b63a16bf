"""What the records that agents send along say of transfers: groups, nodes and links that are slow, as in whole rings.

Of every rank the newest are kept, of all ranks together a bounded number. See ``sampling`` for which they are.
"""

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evermesh.fault.detectors import kernels
from evermesh.fault.detectors.clocks import estimate_offsets
from evermesh.fault.detectors.communicating import find_slow_groups, find_slow_messages
from evermesh.fault.detectors.context import Context
from evermesh.fault.detectors.joining import Joined, Survey, slots_of
from evermesh.fault.detectors.matching import Matched, match
from evermesh.fault.detectors.message_delays import Edges, NodeDelay, delays_between_nodes, edges_of
from evermesh.fault.detectors.slow_jobs import transfers_of
from evermesh.fault.events import Finding
from evermesh.fault.recorder.record import OPERATIONS, RECORD

_MOST, _LEAST, _IN_ALL = 512, 32, 1 << 18
"""Records of a rank, and of all, beyond which a rank has the least: those of two windows."""
_BYTES = np.dtype((np.void, RECORD.itemsize))
"""A record; numpy joins arrays of these faster than of fields."""


@dataclass(frozen=True, slots=True)
class Transfers:
    """The sampled records of all ranks side by side."""

    joined: Joined
    matched: Matched
    counts: Mapping[int, int]
    """Records by step."""
    edges: Edges

    def find_slow(self) -> list[Finding]:
        """Groups, nodes, sources, destinations and links that are slow."""
        return find_slow_groups(self.joined, self.matched) + find_slow_messages(self.joined, self.edges)

    def between_nodes(self) -> list[NodeDelay]:
        """The delay matrix, as far as messages crossed from node to node."""
        return delays_between_nodes(self.joined, self.edges)

    def of_steps(self, survey: Survey) -> np.ndarray:
        """Array [steps]: seconds that a rank spends in transfers, from those of its records; not a number: there are none."""
        sampled = np.array([self.counts.get(survey.first_step + index, 0) for index in range(survey.num_steps)])
        in_all = survey.of_step[:, :, kernels.COUNT].sum(axis=0)
        found: np.ndarray = np.where(
            sampled > 0, transfers_of(survey, self.matched) * in_all / np.maximum(sampled, 1), np.nan
        )
        return found


class Samples:
    """Of the ranks of one job."""

    def __init__(self, num_ranks: int) -> None:
        self._most = min(_MOST, max(_LEAST, _IN_ALL // max(num_ranks, 1)))
        self._of_rank: dict[int, deque[np.ndarray]] = {}
        """Parts, oldest first."""

    def take(self, rank: int, records: np.ndarray) -> None:
        """Take what is new of a rank; what is not newer than what is known is left out."""
        parts = self._of_rank.setdefault(rank, deque())
        if parts and len(records) and records["sequence"][0] <= parts[-1]["sequence"][-1]:
            records = records[records["sequence"] > parts[-1]["sequence"][-1]]
        if len(records):
            parts.append(records)
        while sum(map(len, parts)) - len(parts[0] if parts else ()) >= self._most:
            parts.popleft()

    def of(self, ranks: Sequence[int]) -> list[np.ndarray]:
        """What is kept of these ranks, oldest first: parts of one array, which takes no memory that smaller ones left."""
        parts = [[part.view(_BYTES) for part in self._of_rank.get(rank, ())] for rank in ranks]
        ends = np.cumsum([sum(map(len, of)) for of in parts]).astype(np.int64)
        whole = np.concatenate([*itertools.chain(*parts), np.empty(0, _BYTES)]).view(RECORD)
        return [records[-self._most :] for records in np.split(whole, ends[:-1])]

    def transfers(self, joined: Joined, context: Context) -> Transfers | None:
        """Lay them side by side; ``joined``: the same ranks and their groups. None: there are none yet."""
        found = self.of([trace.rank for trace in joined.traces])
        if not any(map(len, found)):
            return None
        _renumber(joined, found)
        traces = (replace(trace, records=records) for trace, records in zip(joined.traces, found, strict=True))
        sampled = replace(joined, traces=tuple(traces))
        steps, counts = np.unique(np.concatenate([records["step"] for records in found]), return_counts=True)
        offsets = dict(context.offsets)
        nodes = {trace.node for trace in joined.traces}
        matched = match(
            sampled, slots_of(sampled), {node: of.offset_ns for node, of in offsets.items() if node in nodes}
        )
        if len(nodes) > 1 and not offsets:
            offsets = estimate_offsets(sampled, matched)
            matched.move({node: of.offset_ns for node, of in offsets.items()}, sampled)
        records_of = dict(zip(steps.tolist(), counts.tolist(), strict=True))
        return Transfers(sampled, matched, records_of, edges_of(sampled, offsets))


def _renumber(joined: Joined, found: Sequence[np.ndarray]) -> None:
    """Count collectives of every group as if those between them had not been, in place; messages keep their numbers."""
    groups = np.concatenate(
        [_groups_of(records, local) for records, local in zip(found, joined.local_groups, strict=True)]
    )
    numbers = _column(found, "number")
    chosen = np.flatnonzero((groups >= 0) & (_column(found, "operation") < OPERATIONS.index("send")))
    keys = groups[chosen].astype(np.int64) << 32 | numbers[chosen].astype(np.int64)
    known, inverse = np.unique(keys, return_inverse=True)
    first = np.searchsorted(known, (known >> 32) << 32)
    numbers[chosen] = (np.arange(len(known)) - first)[inverse]
    ends = np.cumsum([len(records) for records in found])
    for records, of_rank in zip(found, np.split(numbers, ends[:-1]), strict=True):
        records["number"] = of_rank


def _groups_of(records: np.ndarray, local_groups: np.ndarray) -> np.ndarray:
    """Array [records] of int32: the group of each among those of all ranks, -1: none."""
    known: np.ndarray = np.append(local_groups, -1).astype(np.int32)
    return known[np.minimum(records["group"].astype(np.int64), len(local_groups))]


def _column(found: Sequence[np.ndarray], name: str) -> np.ndarray:
    """A field of all records: of many ranks a copy of whole records takes too much memory."""
    column: np.ndarray = np.concatenate([records[name] for records in found])
    return column
