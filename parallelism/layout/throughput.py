"""How long a step takes with a layout, and what that time consists of; imports no torch.

``estimate`` is a closed formula: all work spread evenly over the ranks, the bubble of the pipeline, what is exchanged once
per step on the links that it uses. It leaves out what only a plan shows (packs that are not full, ranks that wait), so it
is a little early; ``planned`` has the real planner plan every batch and puts its makespan in the place of the formula.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.layout.degrees import Layout
from evermesh.parallelism.layout.exchange import Exchanged, exchanged
from evermesh.parallelism.layout.rates import Hardware, Rates, rates
from evermesh.parallelism.layout.sample import Batch
from evermesh.parallelism.layout.sizes import contents
from evermesh.parallelism.planner import plan_batch
from evermesh.parallelism.pool import Pool


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step, by what they are spent on; the parts add up to the whole."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def binding(self) -> str:
        """The largest part."""
        return max(self.parts, key=lambda name: self.parts[name])

    def __str__(self) -> str:
        shown = sorted(self.parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {seconds:.3g} s" for name, seconds in shown if seconds >= 0.005 * self.total)


class Setup(NamedTuple):
    """A layout of a model on given hardware, and what follows from these without any batch."""

    shape: ModelShape
    layout: Layout
    hardware: Hardware
    rates: Rates
    traffic: Exchanged
    message_s_per_token: float
    """Of one message between stages."""

    @classmethod
    def of(cls, shape: ModelShape, layout: Layout, hardware: Hardware) -> "Setup":
        """Raises LayoutDoesNotFit where nodes that have to talk cannot."""
        return cls.from_parts(
            shape, layout, hardware, rates(shape, layout, hardware), exchanged(shape, layout, hardware)
        )

    @classmethod
    def from_parts(
        cls, shape: ModelShape, layout: Layout, hardware: Hardware, found: Rates, traffic: Exchanged
    ) -> "Setup":
        """Of what is known already."""
        message = 0.0
        if layout.pp > 1:
            wraps = layout.virtual_stages > 1 and layout.schedule != "zero-bubble-v"
            link = hardware.network.link_bytes_per_s(layout.stage_size, wraps=wraps)
            message = shape.hidden * hardware.precision.element_bytes / layout.tp / link
        return cls(shape, layout, hardware, found, traffic, message)

    def least(self, batches: Sequence[Batch], fewest_tokens: int) -> float:
        """Seconds that no capacity of at least ``fewest_tokens`` can beat."""
        layout, found = self.layout, self.rates
        tokens, pairs = (
            sum(counts) / len(batches) for counts in zip(*((b.tokens, b.pairs) for b in batches), strict=True)
        )
        work = found.token * tokens + (found.pair + found.recompute_pair) * pairs
        work += found.offload_s(tokens, pairs).beyond
        busy = work / (layout.hdp * layout.pp) / max(self.hardware.network.speeds)
        number = max(1, -(-max(batch.tokens for batch in batches) // (layout.hdp * fewest_tokens)))
        return busy * (1.0 + bubble(layout) / number) + sum(self.traffic.once.values())

    def unevenness(self, pairs_per_token: float) -> float:
        """How much longer everything takes because stages differ in work, and devices in speed; 1: not at all."""
        shares = _stage_shares(self, pairs_per_token)
        network, layout = self.hardware.network, self.layout
        if network.is_even:
            return layout.pp * max(shares) / network.speeds[0]
        speeds = network.pipeline_speeds(layout, shares)
        # what runs in lock-step waits for the slowest; others get work by their speed
        return 1.0 / min(speeds) if layout.runs_in_waves else layout.hdp / sum(speeds)


def estimate(setup: Setup, batches: Sequence[Batch]) -> StepTime:
    """The mean over ``batches``, by formula."""
    return _mean([_estimate(setup, batch) for batch in batches])


def planned(setup: Setup, batches: Sequence[Batch]) -> StepTime:
    """The mean over ``batches``, each of them planned."""
    return _mean([_planned(setup, batch) for batch in batches])


def bubble(layout: Layout) -> float:
    """Time that each rank of a pipeline is idle, in units of what one micro-batch takes on it.

    For equal micro-batches, of which there are a multiple of the ranks, and at least twice as many in the shape of a V; never
    less. (p - 1) / v for 1F1B; where gradients of weights are put off, they fill it (Qi et al., arXiv 2401.10241).
    """
    share = 1.0
    if layout.pipeline.splits_backward:
        again = layout.recompute == "block"
        forward, backward_input, backward_weight = 1.0, 1.0 + again, 1.0
        share = (forward + backward_input - backward_weight) / (3.0 + again)
    return share * (layout.pp - 1) / layout.virtual_stages


def _estimate(setup: Setup, batch: Batch) -> StepTime:
    layout, found = setup.layout, setup.rates
    parts = _work(setup, batch)
    uneven = setup.unevenness(batch.pairs / batch.tokens)
    parts["uneven stages"] = sum(parts.values()) * (uneven - 1.0)
    busy = sum(parts.values())
    number = _micro_batches(layout, batch)
    parts["pipeline bubble"] = bubble(layout) * busy / number
    parts["messages"] = _messages(setup, batch, busy, number)
    longest = batch.longest_s(layout.hdp, layout.capacity, found, _ranks_in_node(setup)) * min(1.0, uneven)
    parts["waiting"] = max(0.0, longest - busy - parts["pipeline bubble"])
    return StepTime(parts | _around(setup, busy, number))


def _planned(setup: Setup, batch: Batch) -> StepTime:
    """The makespan of the plan, told apart into the same parts; what the formula cannot tell is waiting."""
    closed = dict(_estimate(setup, batch).parts)
    pool = Pool.of(setup.layout.hdp, _ranks_in_node(setup))
    plan = plan_batch(batch.lengths, setup.layout, setup.rates.cost_model(), pool=pool)
    uneven = setup.unevenness(batch.pairs / batch.tokens)
    left = (plan.certificate.makespan_s - sum(_work(setup, batch).values())) * uneven
    if left < 0:  # rings that the planner shares better than by memory alone
        closed["rings"] += left / uneven
        closed["uneven stages"] += left - left / uneven
        left = 0.0
    closed["pipeline bubble"] = min(left, closed["pipeline bubble"])
    closed["waiting"] = left - closed["pipeline bubble"]
    return StepTime(closed)


def _work(setup: Setup, batch: Batch) -> dict[str, float]:
    """Seconds of each device, if all of them share the work evenly."""
    layout, found = setup.layout, setup.rates
    shared = layout.hdp * layout.pp
    offloading = found.offload_s(batch.tokens, batch.pairs)
    return {
        "matrix products": found.products * batch.tokens / shared,
        "attention": found.pair * batch.pairs / shared,
        "recomputation": (
            (found.recompute * batch.tokens - offloading.saved + found.recompute_pair * batch.pairs) / shared
        ),
        "tensor traffic": found.tensor * batch.tokens / shared,
        "expert traffic": found.experts * batch.tokens / shared,
        "offloading": offloading.exposed / shared,
        "rings": batch.ring_s(layout.capacity, found, _ranks_in_node(setup)) / shared,
        "fixed": found.layer * max(1.0, batch.tokens / (layout.hdp * layout.capacity)) / layout.pp,
    }


def _micro_batches(layout: Layout, batch: Batch) -> int:
    """Of an HDP rank, if all are full."""
    return max(1, -(-batch.tokens // (layout.hdp * layout.capacity)))


def _ranks_in_node(setup: Setup) -> int:
    """HDP ranks of a stage that share a node."""
    return max(1, setup.hardware.network.devices // setup.layout.tp)


def _messages(setup: Setup, batch: Batch, busy: float, number: int) -> float:
    """Messages hide behind computation, but not while a pipeline fills and drains, nor where links are slower."""
    layout = setup.layout
    if layout.pp == 1:
        return 0.0
    tokens = batch.tokens / (layout.hdp * number)
    one = tokens * setup.message_s_per_token
    too_slow = max(0.0, 2.0 * layout.virtual_stages * one * number - busy)
    return 2.0 * (layout.pp - 1) * one + too_slow


def _around(setup: Setup, busy: float, number: int) -> dict[str, float]:
    """What is exchanged beside the micro-batches, and what of theirs does not hide."""
    once, repeated = setup.traffic.once, setup.traffic.per_micro_batch * number
    exposed = max(0.0, repeated - busy) + setup.hardware.device.overlap_loss * min(repeated, busy)
    return {**once, "sharded parameters": once["sharded parameters"] + exposed}


def _stage_shares(setup: Setup, pairs_per_token: float) -> list[float]:
    """Of the time of a token, by pipeline rank."""
    shape, layout, found = setup.shape, setup.layout, setup.rates
    if layout.pp == 1:
        return [1.0]
    head = 2.0 * shape.hidden * shape.vocabulary
    per_flop = found.products / shape.linear_flops_per_token()
    of_layers = found.token - per_flop * head + (found.pair + found.recompute_pair) * pairs_per_token
    alike = of_layers - per_flop * (shape.linear_flops_per_token() - head)  # all that is not a product
    shares = [
        2.0 * per_flop * content.elements + alike * content.layers / shape.layers + per_flop * head * content.has_head
        for content in contents(shape, layout)
    ]
    return [share / sum(shares) for share in shares]


def _mean(steps: Sequence[StepTime]) -> StepTime:
    return StepTime({name: sum(step.parts[name] for step in steps) / len(steps) for name in steps[0].parts})


__all__ = ["Setup", "StepTime", "bubble", "estimate", "planned"]
