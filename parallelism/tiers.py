"""Tiers of sharding: among how many of the ranks that hold the same part of a model each kind of state is divided.

Parameters are divided among ``parameters`` ranks, gradients among ``gradients``, optimizer states among ``states``; each
number divides the next, and the last the number of all such ranks (the data-parallel ranks). Neighbours come first, so the
busiest exchange, that of parameters, stays on the fastest links. ZeRO-1 is (1, 1, all), ZeRO-2 (1, all, all), ZeRO-3 (all,
all, all) (Rajbhandari et al., arXiv 1910.02054); hybrid sharding is (n, n, n) with n below all (Zhao et al., arXiv
2304.11277); three different numbers are the three levels for slow networks (Xu et al., arXiv 2501.04266).

Imports no torch.
"""

import itertools
import math
from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from evermesh.parallelism.errors import LayoutDoesNotFit

Degree = PositiveInt | Literal["all"]


class Tiers(BaseModel):
    """How the data-parallel ranks divide parameters, gradients and optimizer states."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["tiers"] = "tiers"
    parameters: Degree = 1
    """Ranks that divide the parameters; they are gathered block by block where they are needed."""
    gradients: Degree = 1
    """Ranks that divide the summed gradients; with 1, every rank has all of them."""
    states: Degree = "all"
    """Ranks that divide master parameters and moments."""
    keep_for: Literal["step", "micro_batch"] = "step"
    """How long gathered parameters, and gradients that are not summed yet, stay whole: for a step, or only while their block
    computes. The second needs least memory; it communicates in every micro-batch, so all ranks that divide something run
    equally many, some of them without tokens."""

    @model_validator(mode="after")
    def _degrees_are_nested(self) -> Self:
        degrees = ("parameters", self.parameters), ("gradients", self.gradients), ("states", self.states)
        for (name, inner), (outer_name, outer) in itertools.pairwise(degrees):
            if outer == "all" or (inner != "all" and outer % inner == 0):
                continue
            legal = f"a multiple of {inner}, or all" if inner != "all" else "all"
            raise LayoutDoesNotFit(
                f"sharding.{name} is {inner} and sharding.{outer_name} {outer}: what is divided among more ranks cannot "
                f"be held by fewer. sharding.{outer_name} can be {legal}.",
                axis="sharding",
            )
        return self

    @property
    def in_lock_step(self) -> bool:
        """Whether ranks exchange something in every micro-batch."""
        return self.keep_for == "micro_batch" and (self.parameters != 1 or self.gradients != 1)

    @property
    def by_block(self) -> bool:
        """Whether the blocks of a model are gathered and summed apart."""
        return self.parameters != 1 or self.in_lock_step

    def division(self, ranks: int) -> "Division":
        """The tiers on ``ranks`` ranks.

        Raises:
            LayoutDoesNotFit: a number of ranks does not divide them.
        """
        wanted = {"parameters": self.parameters, "gradients": self.gradients, "states": self.states}
        sizes = {name: ranks if size == "all" else size for name, size in wanted.items()}
        for name, size in sizes.items():
            if ranks % size:
                legal = ", ".join(str(number) for number in range(1, ranks + 1) if ranks % number == 0)
                raise LayoutDoesNotFit(
                    f"layout.sharding.{name} is {size}, which does not divide the hdp {ranks} ranks that hold the same "
                    f"parameters. It can be {legal}, or all.",
                    axis="sharding",
                )
        return Division(ranks, **sizes)

    def expert_division(self, hdp: int, edp: int) -> "Division":
        """The tiers on the ``edp`` ranks that hold the same experts: of each number what divides them."""
        whole = self.division(hdp)
        sizes = {
            name: edp if getattr(self, name) == "all" else math.gcd(getattr(whole, name), edp)
            for name in ("parameters", "gradients", "states")
        }
        return Division(edp, **sizes)


Level = Literal["parameters", "gradients", "sums", "states"]
LEVELS: tuple[Level, ...] = ("parameters", "gradients", "sums", "states")


class Division(NamedTuple):
    """``ranks`` numbered ranks, and among how many neighbours each kind of state is divided.

    Every rank steps one of ``states`` equal intervals of the parameters. Those of the ranks that divide a gradient are one
    interval together, and so are those that divide the parameters: what a rank holds of each lies in what it holds of the
    one before.
    """

    ranks: int = 1
    parameters: int = 1
    gradients: int = 1
    states: int = 1

    @classmethod
    def of_states(cls, ranks: int) -> Self:
        """Only optimizer states are divided, among all (ZeRO-1)."""
        return cls(ranks, states=ranks)

    def interval(self, rank: int) -> int:
        """Which of ``states`` intervals ``rank`` steps."""
        return self.gradient_part(rank) * (self.states // self.gradients) + rank // self.gradients % self._states

    def gradient_part(self, rank: int) -> int:
        """Which of ``gradients`` parts of the summed gradients ``rank`` holds."""
        return self.parameter_part(rank) * self._gradients + rank // self.parameters % self._gradients

    def parameter_part(self, rank: int) -> int:
        """Which of ``parameters`` parts of the parameters ``rank`` holds."""
        return rank % self.parameters

    def is_first_replica(self, rank: int) -> bool:
        """Whether ``rank`` is the first of those that step the same interval."""
        return rank < self.states

    def holders(self, interval: int) -> tuple[int, ...]:
        """The ranks that step ``interval``."""
        return tuple(rank for rank in range(self.ranks) if self.interval(rank) == interval)

    def size(self, level: Level) -> int:
        """Ranks of a group of ``groups``."""
        return {
            "parameters": self.parameters,
            "gradients": self._gradients,
            "sums": self.ranks // self.gradients,
            "states": self._states,
        }[level]

    def groups(self, level: Level) -> tuple[tuple[int, ...], ...]:
        """The groups that exchange something, each in the order of the parts that its ranks hold.

        - parameters: gather the parameters of a block, and sum its gradients;
        - gradients: sum what the first have summed, each its part; and gather the parameters of the others behind a step;
        - sums: hold the same part of the gradients, and add them up;
        - states: of these, those that step different intervals; they gather the parameters of the others behind a step.
        """
        stride = {"parameters": 1, "gradients": self.parameters, "sums": self.gradients, "states": self.gradients}[
            level
        ]
        size = self.size(level)
        starts = [rank for rank in range(self.ranks) if rank // stride % size == 0]
        return tuple(tuple(range(start, start + size * stride, stride)) for start in starts)

    @property
    def _gradients(self) -> int:
        return self.gradients // self.parameters

    @property
    def _states(self) -> int:
        return self.states // self.gradients


__all__ = ["LEVELS", "Degree", "Division", "Level", "Tiers"]
