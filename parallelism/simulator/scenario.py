"""The cluster that a plan is replayed on, and what goes wrong there."""

from dataclasses import dataclass

from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.pool import Pool


@dataclass(frozen=True, slots=True)
class SlowRank:
    """An HDP rank, all its pipeline stages, that is slower from some time on."""

    rank: int
    factor: float
    """Of its speed: at 0.7 it takes 1 / 0.7 of the time."""
    from_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SlowLink:
    """A link between two HDP ranks, in one direction."""

    source: int
    target: int
    factor: float
    """Of its bandwidth."""


@dataclass(frozen=True, slots=True)
class Lost:
    """An HDP rank that ends in the middle of a step, with all its pipeline stages."""

    rank: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Synchronization:
    """How gradients are summed over all HDP ranks at the end of a step: once around a ring of ranks, there and back.

    A rank sends ``2 (n - 1) / n`` of the bytes in ``2 (n - 1)`` steps (Patarasuk and Yuan, 2009), and all go as the slowest
    link does.
    """

    num_bytes: float
    """Of the gradients of one rank."""
    bytes_per_s: float
    step_s: float = 0.0
    """Fixed seconds of a step."""

    def seconds(self, ranks: int, slowest: float = 1.0) -> float:
        """For so many ranks, the slowest link having that factor."""
        if ranks == 1:
            return 0.0
        return 2 * (ranks - 1) * (self.num_bytes / ranks / (self.bytes_per_s * slowest) + self.step_s)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a step meets.

    Raises:
        LayoutDoesNotFit: it names a rank that the pool does not have, or a factor or time that cannot be.
    """

    pool: Pool
    slow_ranks: tuple[SlowRank, ...] = ()
    slow_links: tuple[SlowLink, ...] = ()
    lost: tuple[Lost, ...] = ()
    synchronization: Synchronization | None = None
    """None: summing gradients takes no time."""
    layers: int | None = None
    """Layers of the model. Then the members of a ring need not begin together: each runs its own steps, layer by layer, and
    waits for its neighbours there. None: as many as it takes for all to be joined from the start, which is the limit."""

    def __post_init__(self) -> None:
        ranks = [slow.rank for slow in self.slow_ranks] + [lost.rank for lost in self.lost]
        ranks += [rank for link in self.slow_links for rank in (link.source, link.target)]
        for rank in ranks:
            if not 0 <= rank < len(self.pool):
                raise LayoutDoesNotFit(
                    f"there is no rank {rank} among {len(self.pool)} HDP ranks. Name one from 0 to {len(self.pool) - 1}."
                )
        for factor in [slow.factor for slow in self.slow_ranks] + [link.factor for link in self.slow_links]:
            if not 0 < factor < float("inf"):
                raise LayoutDoesNotFit(f"a speed of {factor} times the nominal one; give a positive number.")
        for at_s in [slow.from_s for slow in self.slow_ranks] + [lost.at_s for lost in self.lost]:
            if not 0 <= at_s < float("inf"):
                raise LayoutDoesNotFit(f"something begins {at_s} s after the step does; give 0 or more seconds.")
