"""Whether another layout is worth a switch, as the lengths of sequences change; imports no torch.

The idea of changing strategies between steps is that of Hetu v2 (arXiv 2412.07894). Here it is only decided; what moves a run
is in its trainer. The decision is a pure function of what was seen, and says why.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout.degrees import Layout
from evermesh.parallelism.layout.explain import degrees_of
from evermesh.parallelism.layout.memory import layout_memory
from evermesh.parallelism.layout.network import Network
from evermesh.parallelism.layout.options import SearchOptions
from evermesh.parallelism.layout.policy import SwitchingPolicy
from evermesh.parallelism.layout.search import RankedLayout, estimate_layout, search_layouts
from evermesh.parallelism.topology import Topology


class Option(NamedTuple):
    """A layout, and what it would do with the batches of a window."""

    layout: Layout
    step_s: float
    move_s: float
    """To move the state of the run there from where it is."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do, and why."""

    layout: Layout
    """To use from now on."""
    switches: bool
    """Whether it is another one."""
    saves_s: float
    """By the switch, over the batches in sight, what it costs taken off; negative: it would lose so much."""
    reason: str


def decide(current: Option, others: Sequence[Option], policy: SwitchingPolicy) -> Advice:
    """The best of ``others`` if it pays off, else ``current``. Ties go to the one that comes first."""
    if not others:
        return Advice(current.layout, False, 0.0, "no other layout fits")

    def saved(option: Option) -> float:
        return (current.step_s - option.step_s) * policy.in_sight - option.move_s - policy.restart_s

    best = max(others, key=saved)
    gain = 1.0 - best.step_s / current.step_s
    figures = (
        f"{degrees_of(best.layout)} would take {best.step_s:.4g} s a step instead of {current.step_s:.4g} s, "
        f"{gain:+.1%} saved; moving there {best.move_s + policy.restart_s:.3g} s"
    )
    if gain < policy.least_gain:
        return Advice(
            current.layout, False, saved(best), f"{figures}: below {policy.least_gain:.0%} is no reason to move"
        )
    if saved(best) <= 0:
        return Advice(current.layout, False, saved(best), f"{figures}: {policy.in_sight} batches do not pay that back")
    return Advice(best.layout, True, saved(best), f"{figures}: {policy.in_sight} batches save {saved(best):,.0f} s")


Options = Callable[[Sequence[Sequence[int]]], tuple[Option, Sequence[Option]]]
"""From the lengths of the batches of a window: the layout in use, and the others."""


class LayoutAdvisor:
    """Watches the lengths of batches, and says when another layout has been better for long enough.

    Args:
        options: evaluates layouts on a window of batches.
        policy: when a switch is worth it.
    """

    def __init__(self, options: Options, policy: SwitchingPolicy | None = None) -> None:
        self.options, self.policy = options, policy or SwitchingPolicy()
        self._window: deque[tuple[int, ...]] = deque(maxlen=self.policy.window)
        self._seen = 0
        self._in_a_row = 0
        self._advised: Layout | None = None

    def observe(self, lengths: Sequence[int]) -> Advice | None:
        """Take note of one batch. Advice, when a window ends that is the last of enough in a row for a switch; else None.

        The same advice is not given twice in a row.
        """
        if not lengths:
            return None
        self._window.append(tuple(lengths))
        self._seen += 1
        if self._seen % self.policy.window:
            return None
        advice = decide(*self.options(self._window), self.policy)
        self._in_a_row = self._in_a_row + 1 if advice.switches else 0
        if not advice.switches:
            self._advised = None
        if self._in_a_row < self.policy.patience or advice.layout == self._advised:
            return None
        self._advised = advice.layout
        return advice


class SearchedOptions:
    """Options from a new search for every window.

    Args:
        current: the layout in use.
        shape: of the model.
        topology: of the cluster.
        search: what to choose from; plans nothing.
    """

    def __init__(
        self, current: Layout, shape: ModelShape, topology: Topology, search: SearchOptions | None = None
    ) -> None:
        self.current, self.shape, self.topology = current, shape, topology
        self.search = (search or SearchOptions()).model_copy(update={"planned": 0})

    def __call__(self, batches: Sequence[Sequence[int]]) -> tuple[Option, Sequence[Option]]:
        """See ``Options``."""
        try:
            found = search_layouts(self.shape, self.topology, batches, self.search)
        except LayoutDoesNotFit:  # by formula not even the one in use fits: no advice is better than a guess
            found = []
        current = estimate_layout(self.shape, self.topology, batches, self.current, self.search)
        others = [self._option(one) for one in found if one.layout != self.current]
        return Option(self.current, current.step.total, 0.0), others

    def _option(self, found: RankedLayout) -> Option:
        return Option(found.layout, found.step.total, move_s(self.shape, found.layout, self.topology, self.search))


def move_s(shape: ModelShape, layout: Layout, topology: Topology, options: SearchOptions) -> float:
    """Seconds until every rank has what it holds with ``layout``, as if it had nothing of it: an upper bound.

    Every rank receives its parameters and its optimizer states over its share of the slowest network between any nodes.
    """
    network = Network(topology)
    states = [rank.states for rank in layout_memory(shape, layout, options.precision)]
    received = max(held.parameters + held.states for held in states)
    return received / min(network.device_bytes_per_s(network.world_size), network.intra_bytes_per_s)


__all__ = ["Advice", "LayoutAdvisor", "Option", "Options", "SearchedOptions", "decide", "move_s"]
