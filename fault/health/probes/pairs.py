"""Which pairs of nodes test their connection, in rounds, and which node or link the results name. Pure functions.

Rounds are matchings: in each of them a node talks to one other node, so that nobody shares its cable. With few nodes every
pair has a turn (n - 1 rounds, or n); with many, each node meets its neighbours and those 2, 4, 8, ... further, at most
three rounds per distance: O(log n) rounds, in which each node meets up to 2 log2 n others.

A node that is bad spoils every pair in which it takes part, a link that is bad only its own. So whoever has one good pair
is no bad node, and a bad pair of two such nodes is a bad link.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from evermesh.fault.health.probes.link import LinkResult
from evermesh.fault.health.verdicts import Verdict

Pair = tuple[int, int]
"""Two nodes, the lower number first."""
_FEW = 16
"""Up to so many nodes every pair has a turn."""
_SLOW = 0.5
"""Of what most nodes reach with their best peer: slower pairs are bad. DLRover calls twice the median time a straggler."""


class Faults(NamedTuple):
    """What explains the results of all pairs."""

    nodes: frozenset[int]
    """Bad: each has met a node that is not, and none well."""
    links: frozenset[Pair]
    """Bad, between nodes that are not."""
    unclear: frozenset[Pair]
    """Bad, and nobody can tell whether it is one of the nodes or the link: neither has met anybody else well."""


def rounds(nodes: int) -> list[list[Pair]]:
    """Who meets whom. No node is twice in a round, no pair in two rounds."""
    if nodes < 2:
        return []
    return list(_round_robin(nodes) if nodes <= _FEW else _circles(nodes))


def _round_robin(nodes: int) -> Iterator[list[Pair]]:
    """The circle method: one node stays, the others move on by one place in each round."""
    places: list[int | None] = [*range(nodes), *([None] if nodes % 2 else [])]
    for _ in range(len(places) - 1):
        half = len(places) // 2
        facing = zip(places[:half], reversed(places[half:]), strict=True)
        yield [_pair(a, b) for a, b in facing if a is not None and b is not None]
        places.insert(1, places.pop())


def _circles(nodes: int) -> Iterator[list[Pair]]:
    """For each distance 1, 2, 4, ... the circles that its pairs form, taken apart into matchings."""
    distance = 1
    while distance <= nodes // 2:
        colours: list[list[Pair]] = [[], [], []]
        for circle in _circles_of(nodes, distance):
            for place, pair in enumerate(circle):
                is_odd_end = len(circle) % 2 == 1 and len(circle) > 1 and place == len(circle) - 1
                colours[2 if is_odd_end else place % 2].append(pair)
        yield from (colour for colour in colours if colour)
        distance *= 2


def _circles_of(nodes: int, distance: int) -> Iterator[list[Pair]]:
    if 2 * distance == nodes:
        yield from ([(node, node + distance)] for node in range(distance))
        return
    seen: set[int] = set()
    for start in range(nodes):
        walk = [start]
        while start not in seen and (following := (walk[-1] + distance) % nodes) != start:
            walk.append(following)
        if start not in seen:
            yield [_pair(a, b) for a, b in pairwise([*walk, start])]
        seen.update(walk)


def _pair(a: int, b: int) -> Pair:
    return min(a, b), max(a, b)


def is_good(results: Mapping[Pair, LinkResult]) -> dict[Pair, bool]:
    """A pair that works, and is not far slower than most nodes with their best peer: a slow node makes its peers slow too."""
    best: dict[int, float] = {}
    for pair, result in results.items():
        for node in pair:
            best[node] = max(best.get(node, 0.0), 0.0 if result.failed else result.bytes_per_s)
    usual = median(best.values()) if best else 0.0
    return {pair: not found.failed and found.bytes_per_s >= _SLOW * usual for pair, found in results.items()}


def find_faults(good: Mapping[Pair, bool]) -> Faults:
    """The nodes and links that explain which pairs are good; exact for one fault among three nodes or more."""
    known_good = {node for pair, is_good in good.items() if is_good for node in pair}
    bad_pairs = [pair for pair, is_good in good.items() if not is_good]
    links = {pair for pair in bad_pairs if known_good.issuperset(pair)}
    nodes = {node for pair in bad_pairs for node in pair if node not in known_good and known_good & set(pair)}
    unclear = {pair for pair in bad_pairs if pair not in links and not nodes & set(pair)}
    return Faults(frozenset(nodes), frozenset(links), frozenset(unclear))


def judge_pairs(names: Sequence[str], results: Mapping[Pair, LinkResult]) -> list[Verdict]:
    """One verdict for each node and link that is at fault, or one that all is well."""
    faults = find_faults(is_good(results))
    found = [_node(names, node, results) for node in sorted(faults.nodes)]
    found += [_link(names, pair, results[pair], "") for pair in sorted(faults.links)]
    found += [_link(names, pair, results[pair], "one of them, or the link: ") for pair in sorted(faults.unclear)]
    speeds = [result.bytes_per_s for result in results.values() if not result.failed]
    if found or not speeds:
        return found
    numbers = {"pairs": float(len(results)), "least_bytes_per_s": min(speeds), "median_bytes_per_s": median(speeds)}
    fact = f"{len(results)} pairs of {len(names)} nodes, {min(speeds) / 1e9:.2f} to {max(speeds) / 1e9:.2f} GB/s"
    return [Verdict("network between nodes", "ok", fact, numbers)]


def _node(names: Sequence[str], node: int, results: Mapping[Pair, LinkResult]) -> Verdict:
    own = [result for pair, result in results.items() if node in pair]
    failed = [result.failed for result in own if result.failed]
    speed = max((result.bytes_per_s for result in own if not result.failed), default=0.0)
    how = f"{len(failed)} of {len(own)} connections failed" + (f" ({failed[0]})" if failed else "")
    how += f"; {speed / 1e9:.2f} GB/s at best, less than half of what others reach" if speed else ""
    numbers = {"pairs": float(len(own)), "failed": float(len(failed)), "best_bytes_per_s": speed}
    return Verdict(f"network of {names[node]}", "bad", how, numbers, "look at its cable, network card and switch port")


def _link(names: Sequence[str], pair: Pair, result: LinkResult, doubt: str) -> Verdict:
    check = f"network between {names[pair[0]]} and {names[pair[1]]}"
    how = result.failed or f"{result.bytes_per_s / 1e9:.2f} GB/s, less than half of what others reach"
    return Verdict(
        check, "bad", f"{doubt}{how}", {"bytes_per_s": result.bytes_per_s}, "look at the switches between them"
    )
