"""Where every rank stands: the one place that knows how ranks are numbered."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks in rows: ``hdp`` rows of ``tp`` consecutive ranks each, so that a tensor-parallel group shares a node.

    The ranks of a row process the same pieces, each with its part of the model; the ranks of a column hold the same part.
    """

    hdp: int
    tp: int = 1

    @property
    def size(self) -> int:
        """Ranks of the mesh."""
        return self.hdp * self.tp

    def rank(self, hdp_rank: int, tp_rank: int) -> int:
        """The rank at these coordinates."""
        return hdp_rank * self.tp + tp_rank

    def coordinates(self, rank: int) -> tuple[int, int]:
        """HDP rank and tensor-parallel rank of ``rank``."""
        return divmod(rank, self.tp)

    def row(self, hdp_rank: int) -> range:
        """The tensor-parallel group of an HDP rank."""
        return range(hdp_rank * self.tp, (hdp_rank + 1) * self.tp)

    def column(self, tp_rank: int) -> range:
        """The HDP ranks with this tensor-parallel rank."""
        return range(tp_rank, self.size, self.tp)


__all__ = ["Mesh"]
