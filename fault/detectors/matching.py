"""Collectives of all ranks side by side: one row for each number of a group, one cell for every member."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evermesh.fault.detectors import kernels
from evermesh.fault.detectors.joining import Joined
from evermesh.fault.recorder.record import OPERATIONS

_SPAN = 2
"""A group has at most so many times as many rows as its busiest member has records."""
UNEVEN = tuple(OPERATIONS.index(name) for name in ("all_to_all", "gather", "scatter"))
"""What ranks may do with different bytes."""


@dataclass(frozen=True, slots=True)
class Matched:
    """Who entered what when, in the clock of everybody less the offset of his node."""

    entered_at: np.ndarray
    """Array [cells], ns; 0: nobody knows that the member entered."""
    ended_at: np.ndarray
    """Array [cells], ns; 0: it has not left, or nobody saw it."""
    first_numbers: np.ndarray
    """Array [groups]: number of the first row."""
    row_starts: np.ndarray
    cell_starts: np.ndarray
    sizes: np.ndarray
    reference: np.ndarray
    """Array [rows, 2]: bytes; peer, operation and dtype of whoever was looked at first."""
    steps: np.ndarray
    """Array [rows]: step of the same; -1: nobody entered."""
    flags: np.ndarray
    """Array [rows]: in what the members differ."""

    def rows(self, group: int) -> slice:
        """The rows of a group."""
        return slice(int(self.row_starts[group]), int(self.row_starts[group + 1]))

    def num_rows(self, group: int) -> int:
        return int(self.row_starts[group + 1] - self.row_starts[group])

    def cells(self, group: int, of: np.ndarray) -> np.ndarray:
        """``entered_at`` or ``ended_at`` of a group, array [rows, members]; a view."""
        return of[self.cell_starts[group] : self.cell_starts[group + 1]].reshape(-1, int(self.sizes[group]))

    def transfers_ns(self) -> np.ndarray:
        """Array [rows]: how long the last to enter was inside; 0: not all have left."""
        found = np.zeros(int(self.row_starts[-1]), np.int64)
        kernels.transfer_times(self.entered_at, self.ended_at, self.sizes, self.row_starts, self.cell_starts, found)
        return found

    def move(self, offset_ns: Mapping[str, int], joined: Joined) -> None:
        """Take what the clocks of nodes are ahead, by name, out of all times."""
        for group, members in enumerate(joined.members):
            ahead = [offset_ns.get(joined.traces[trace].node, 0) if trace >= 0 else 0 for trace in members.tolist()]
            if any(ahead):
                for of in (self.entered_at, self.ended_at):
                    cells = self.cells(group, of)
                    np.subtract(cells, np.array(ahead, np.int64), out=cells, where=cells > 0)

    def operations(self, rows: slice) -> np.ndarray:
        """Array [rows]: index in OPERATIONS."""
        return (self.reference[rows, 1] >> np.uint64(32)) & np.uint64(0xFF)


def match(joined: Joined, of_slot: np.ndarray, offset_ns: Mapping[str, int] | None = None) -> Matched:
    """Lay the collectives of all ranks side by side. ``of_slot``: of their survey; ``offset_ns``: what the clock of a node is
    ahead."""
    first_numbers, num_rows = _rows_of_groups(joined, of_slot)
    row_starts = np.concatenate([[0], np.cumsum(num_rows)]).astype(np.int64)
    cell_starts = np.concatenate([[0], np.cumsum(num_rows * joined.sizes)]).astype(np.int64)
    times = np.zeros((int(cell_starts[-1]), 2), np.int64)  # both times of a cell, and all of a row, share a cache line
    reference = np.zeros((int(row_starts[-1]), 3), np.uint64)
    reference[:, 2] = kernels.NO_STEP
    flags = np.zeros(len(reference), np.uint8)
    for index, trace in enumerate(joined.traces):
        kernels.lay_beside(
            joined.words(index),
            joined.local_groups[index],
            joined.places[index],
            joined.sizes,
            first_numbers,
            row_starts,
            cell_starts,
            (offset_ns or {}).get(trace.node, 0),
            times,
            reference,
            flags,
        )
    found = Matched(
        times[:, 0],
        times[:, 1],
        first_numbers,
        row_starts,
        cell_starts,
        joined.sizes,
        reference[:, :2],
        reference[:, 2].view(np.int64),
        flags,
    )
    uneven = np.isin(found.operations(slice(None)), UNEVEN) & (flags & kernels.DIFFERS_OPERATION == 0)
    flags[uneven] &= np.uint8(0xFF ^ kernels.DIFFERS_BYTES)
    return found


def _rows_of_groups(joined: Joined, of_slot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First number and number of rows of every group. A number that is far off makes no rows for what lies between."""
    first = of_slot[:, kernels.FIRST]
    last = of_slot[:, kernels.LAST]
    starts = joined.slot_starts[:-1]
    if not len(starts):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    lowest = np.minimum.reduceat(np.where(first < 0, np.iinfo(np.int64).max, first), starts)
    highest = np.maximum.reduceat(last, starts)
    most = np.maximum.reduceat(np.where(first < 0, 0, last - first + 1), starts)
    most = np.minimum(most, max((len(trace.records) for trace in joined.traces), default=0))
    lowest = np.maximum(lowest, highest - _SPAN * most + 1)
    rows = np.where(highest < 0, 0, highest - lowest + 1)
    return np.where(rows > 0, lowest, 0).astype(np.int64), rows.astype(np.int64)
