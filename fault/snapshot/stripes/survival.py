"""How likely snapshots in memory survive: exact counting, simulation to check it, and replication to compare with.

Of all ways to lose f of N nodes at once those that can be recovered from are the coefficient of x^f in the product over
all groups of their polynomials: sum of C(g, i) x^i for i up to the tolerance m of a stripe of g. Replication is the
same with groups of copies.
"""

import math
import random
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple

from evermesh.fault.snapshot.coding import Code
from evermesh.fault.snapshot.stripes.placement import Candidate, StripePlan

_MOST_ENUMERATED = 20_000
_Z = 3.2905
"""Of the normal distribution: bounds hold with a probability of 99.9 %."""


class Scheme(NamedTuple):
    """A way to protect a number of nodes."""

    name: str
    nodes: int
    memory: float
    """Extra bytes per byte of data."""
    ways: tuple[int, ...]
    """By number of losses, the sets of lost nodes that can be recovered from."""

    def survival(self, losses: int) -> float:
        """Probability that the loss of so many nodes, any with the same chance, can be recovered from."""
        if losses >= len(self.ways):
            return 0.0
        return float(Fraction(self.ways[losses], math.comb(self.nodes, losses)))


class Estimate(NamedTuple):
    """Of a probability."""

    value: float
    low: float
    high: float
    """Bounds that hold with a probability of 99.9 % (E. B. Wilson, 1927); both equal the value where it was counted."""


def striped(sizes: Sequence[int], parity: int, most_losses: int) -> Scheme:
    """Stripes of these sizes, each with so many parity parts."""
    ways = _product(([math.comb(size, lost) for lost in range(parity + 1)] for size in sizes), most_losses)
    memory = sum(size * parity / (size - parity) for size in sizes) / sum(sizes)
    return Scheme(f"{Code(max(sizes) - parity, parity)}", sum(sizes), memory, ways)


def replicated(nodes: int, copies: int, most_losses: int) -> Scheme:
    """Groups of ``copies`` nodes that all hold the data of each other; nodes beyond a multiple join the last groups."""
    number = max(nodes // copies, 1)
    sizes = [nodes // number + (group < nodes % number) for group in range(number)]
    ways = _product(([math.comb(size, lost) for lost in range(size)] for size in sizes), most_losses)
    return Scheme(f"{copies} copies", nodes, copies - 1, ways)


def replicated_within(nodes: int, memory: float, most_losses: int) -> Scheme:
    """Copies in the same memory as a code: as many whole copies of all nodes as fit, or else a copy of some nodes.

    With less than a copy each, a node's copy is best kept by one that has none, if a node keeps one at most. Where more
    than half of the nodes have one, some stand in pairs of which one may be lost.
    """
    if memory >= 1:
        scheme = replicated(nodes, 1 + int(memory), most_losses)
        return scheme._replace(name=f"copies in +{memory:.0%}")
    copied = int(nodes * memory)
    pairs = max(0, -(-(2 * copied - nodes) // 2))
    one_way = copied - 2 * pairs
    ways = _product([[1, 2]] * pairs + [[1, 1]] * one_way, most_losses)
    return Scheme(f"copies in +{memory:.0%}", nodes, memory, ways)


def simulated(sizes: Sequence[int], parity: int, losses: int, trials: int, seed: int = 0) -> Estimate:
    """The survival of :func:`striped`, by drawing lost nodes and counting those of every stripe."""
    drawn = random.Random(seed)
    stripe_of = [stripe for stripe, size in enumerate(sizes) for _ in range(size)]
    recovered = 0
    for _ in range(trials):
        lost = [0] * len(sizes)
        for node in drawn.sample(range(len(stripe_of)), losses):
            lost[stripe_of[node]] += 1
        recovered += max(lost) <= parity
    return _wilson(recovered, trials)


def domains_survival(
    plan: StripePlan, nodes: Sequence[Candidate], kind: str, losses: int, trials: int = 4000
) -> Estimate:
    """Probability that the loss of so many whole failure domains can be recovered from; counted where that is
    possible."""
    domain_of = {node.node: node.domain(kind) for node in nodes}
    domains = sorted(set(domain_of.values()))
    held: dict[str, list[tuple[int, int]]] = {domain: [] for domain in domains}
    for number, stripe in enumerate(plan.stripes):
        per = [domain_of[node] for node in stripe.nodes if node is not None]
        for domain in set(per):
            held[domain].append((number, per.count(domain)))
    tolerated = [stripe.code.parity - stripe.nodes.count(None) for stripe in plan.stripes]

    def survives(lost: Iterable[str]) -> bool:
        left = list(tolerated)
        for domain in lost:
            for number, members in held[domain]:
                left[number] -= members
        return min(left) >= 0

    if math.comb(len(domains), losses) <= _MOST_ENUMERATED:
        found = [survives(lost) for lost in combinations(domains, losses)]
        value = sum(found) / len(found) if found else 0.0
        return Estimate(value, value, value)
    drawn = random.Random(losses)
    return _wilson(sum(survives(drawn.sample(domains, losses)) for _ in range(trials)), trials)


def _wilson(hits: int, trials: int) -> Estimate:
    share, spread = hits / trials, _Z * _Z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return Estimate(share, min(share, middle - half), max(share, middle + half))  # equal at 0 and 1, but for rounding


def _product(polynomials: Iterable[Sequence[int]], most: int) -> tuple[int, ...]:
    """Of polynomials with whole coefficients, up to x^most."""
    total = [1]
    for factor in polynomials:
        size = min(len(total) + len(factor) - 1, most + 1)
        longer = [0] * size
        for power, coefficient in enumerate(total):
            for other, times in enumerate(factor[: size - power]):
                longer[power + other] += coefficient * times
        total = longer
    return tuple(total)
