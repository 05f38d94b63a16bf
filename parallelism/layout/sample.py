"""Batches of sequence lengths, and sums over them that a formula needs; imports no torch."""

from collections.abc import Sequence

import numpy as np

from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout.rates import Rates


class Batch:
    """The lengths of the sequences of one step."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        if not self.lengths or min(self.lengths) < 1:
            raise LayoutDoesNotFit("a batch has no sequences, or one without tokens; give positive lengths.")
        self._descending = -np.sort(-np.asarray(self.lengths, dtype=np.float64))
        self.tokens = sum(self.lengths)
        self.pairs = sum(length * (length + 1) // 2 for length in self.lengths)
        """Visible (query, key) pairs."""
        self.longest = int(self._descending[0])

    def ring_s(self, capacity: int, rates: Rates, ranks_in_node: int) -> float:
        """Seconds, over all ranks, in which the smallest rings that memory needs wait for keys and values.

        What is passed around hides behind the attention of the same step, as in ``CostModel.shared_s``.
        """
        long = self._descending[: int(np.searchsorted(-self._descending, -capacity))]
        if not len(long):
            return 0.0
        ring = np.ceil(long / capacity)
        attention = (rates.pair + rates.recompute_pair) * long * (long + 1) / 2 / ring
        per_token = np.where(ring > ranks_in_node, rates.network_token, rates.ring_token)
        passed = (ring - 1) / ring * long * per_token
        return float(np.sum(np.maximum(0.0, passed - attention) * ring))

    def longest_s(self, hdp: int, capacity: int, rates: Rates, ranks_in_node: int) -> float:
        """Seconds of the longest sequence on its best ring, all stages one after the other."""
        least = -(-self.longest // capacity)
        sizes = np.unique(np.minimum(hdp, least * 2 ** np.arange(max(1, (hdp // least).bit_length() + 1))))
        attention = (rates.pair + rates.recompute_pair) * self.longest * (self.longest + 1) / 2 / sizes
        per_token = np.where(sizes > ranks_in_node, rates.network_token, rates.ring_token)
        passed = (sizes - 1) / sizes * self.longest * per_token
        beyond = rates.offload_s(self.longest, self.longest * (self.longest + 1) / 2).beyond / sizes
        return float(np.min(rates.token * self.longest / sizes + beyond + np.maximum(attention, passed)))


__all__ = ["Batch"]
