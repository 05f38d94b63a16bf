"""Where every rank stands: the one place that knows how ranks are numbered."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from evermesh.parallelism.layout import Layout, check_folding

Axis = Literal["pp", "hdp", "tp", "edp", "ep", "etp"]
RankGroup = tuple[int, ...]


class Coordinates(NamedTuple):
    """Of one rank, on the attention side."""

    pp: int
    hdp: int
    tp: int


class ExpertCoordinates(NamedTuple):
    """Of one rank, on the expert side."""

    pp: int
    edp: int
    ep: int
    etp: int


@dataclass(frozen=True, slots=True)
class Mesh:
    """All ranks, factored twice: for attention as pp x hdp x tp, for experts as pp x edp x ep x etp.

    The last axis is the innermost: the ranks of a tensor-parallel group are neighbours, a pipeline stage is a block of
    consecutive ranks, and only the stages are common to both sides. So an expert group may be larger than hdp, and may
    reach over ranks that share a sequence (MoE Parallel Folding, arXiv 2504.14960, section 3.2).

    Raises:
        LayoutDoesNotFit: ep x etp does not divide the ranks of a stage.
    """

    hdp: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        check_folding(self.hdp, self.tp, self.ep, self.etp)

    @classmethod
    def of(cls, layout: Layout) -> Self:
        """The mesh of a layout."""
        return cls(hdp=layout.hdp, tp=layout.tp, pp=layout.pp, ep=layout.ep, etp=layout.etp)

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.hdp * self.tp

    @property
    def size(self) -> int:
        """Ranks of the mesh."""
        return self.pp * self.stage_size

    @property
    def edp(self) -> int:
        """Ranks of a stage that hold the same part of the same experts."""
        return self.stage_size // (self.ep * self.etp)

    def rank(self, hdp: int, tp: int = 0, pp: int = 0) -> int:
        """The rank at these coordinates."""
        return (pp * self.hdp + hdp) * self.tp + tp

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` stands on the attention side."""
        rest, tp = divmod(rank, self.tp)
        return Coordinates(*divmod(rest, self.hdp), tp)

    def expert_coordinates(self, rank: int) -> ExpertCoordinates:
        """Where ``rank`` stands on the expert side."""
        rest, etp = divmod(rank, self.etp)
        rest, ep = divmod(rest, self.ep)
        return ExpertCoordinates(*divmod(rest, self.edp), ep, etp)

    def groups(self, axis: Axis) -> tuple[RankGroup, ...]:
        """All groups along ``axis``, each with its ranks in the order of their coordinate there."""
        sizes, strides = self._sizes(axis), self._strides(axis)
        length, stride = sizes[axis], strides[axis]
        starts = [rank for rank in range(self.size) if rank // stride % length == 0]
        return tuple(tuple(range(start, start + length * stride, stride)) for start in starts)

    def group(self, axis: Axis, rank: int) -> RankGroup:
        """The group of ``rank`` along ``axis``."""
        return next(group for group in self.groups(axis) if rank in group)

    def holders(self, pp: int) -> tuple[RankGroup, ...]:
        """Of one stage: for every HDP rank, the tensor-parallel group that shares its model."""
        return tuple(tuple(self.rank(hdp, tp, pp) for tp in range(self.tp)) for hdp in range(self.hdp))

    def expert_holders(self, pp: int) -> tuple[RankGroup, ...]:
        """Of one stage: for every edp coordinate, the ranks that share one set of its experts, ep x etp."""
        first, size = pp * self.stage_size, self.ep * self.etp
        return tuple(tuple(range(first + edp * size, first + (edp + 1) * size)) for edp in range(self.edp))

    def _sizes(self, axis: Axis) -> dict[str, int]:
        if axis in ("edp", "ep", "etp"):
            return {"etp": self.etp, "ep": self.ep, "edp": self.edp}
        return {"tp": self.tp, "hdp": self.hdp, "pp": self.pp}

    def _strides(self, axis: Axis) -> dict[str, int]:
        strides, stride = {}, 1
        for name, size in self._sizes(axis).items():
            strides[name] = stride
            stride *= size
        return strides


__all__ = ["Axis", "Coordinates", "ExpertCoordinates", "Mesh", "RankGroup"]
