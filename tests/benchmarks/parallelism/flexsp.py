"""FlexSP (arXiv 2412.01523) restated: its costs and rules, its integer program, and the homogeneous plans it compares with.

None of this is its code. 64 GPUs; a micro-batch is cut into groups of a power of two of them, 2 or more, which share
sequences by heads; all wait for each other at its end. Times are milliseconds, those that the paper profiled for a model of
7B parameters on A100-40G. The program is solved as published, by SCIP (that of ortools) from the best plan with one size of
groups, or in its favour by HiGHS, where groups of one size are used in order, which only takes equal solutions out.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ortools.linear_solver import pywraplp  # type: ignore[import-untyped]
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

GPUS = 64
SIZES = (2, 4, 8, 16, 32, 64)
GROUPS = tuple(size for size in SIZES for _ in range(GPUS // size))
"""All groups that there may be."""
PAIR_MS, TOKEN_MS, FIXED_MS = 5.128e-6, 0.1839576, 629.3563
BANDWIDTH_GBS = {2: 119.54, 4: 104.07, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}
EXCHANGED_MB = 4 * 2 * 32 * 4096 * 2 / 2**20
"""Of a token, in all layers, forward and backward."""
CAPACITY = int((30 * 1024 - 7 * 16 * 1024 / GPUS) / 4.480)
"""Tokens of a GPU: 30 GB, less its share of the model's states, at 4.48 MB a token."""
BUCKETS, MORE_MICRO_BATCHES = 16, 5

MicroBatch = list[tuple[int, list[int]]]
"""Groups: their size and the lengths of their sequences."""


def sequence_ms(length: int, size: int) -> float:
    """What a sequence takes every member of a group of ``size``."""
    return (PAIR_MS * length**2 + TOKEN_MS * length + EXCHANGED_MB * length / BANDWIDTH_GBS[size]) / size


def micro_batch_ms(groups: MicroBatch) -> float:
    """Until the last group has finished."""
    return FIXED_MS + max(sum(sequence_ms(length, size) for length in lengths) for size, lengths in groups)


def check(plan: Sequence[MicroBatch], lengths: Sequence[int]) -> None:
    """Raise unless every sequence is there once, and GPUs and memory suffice."""
    placed = sorted(length for groups in plan for _, of_group in groups for length in of_group)
    assert placed == sorted(lengths), "sequences are missing or twice there"
    for groups in plan:
        assert sum(size for size, _ in groups) <= GPUS, "a micro-batch has more groups than GPUs"
        assert all(size in SIZES for size, _ in groups), "a group is no power of two"
        assert all(sum(of_group) <= CAPACITY * size for size, of_group in groups), "a group exceeds its memory"


def bound_ms(lengths: Sequence[int]) -> float:
    """No plan under these rules is faster: fixed times, all work at its least, and what the longest sequence costs others.

    For each size of the group that runs the longest sequence and each number of micro-batches the least sum of their
    durations for which all work fits, by bisection: the less time there is, the larger are the groups that sequences need.
    """
    ordered, best = sorted(lengths, reverse=True), math.inf
    for size in (size for size in SIZES if fits(ordered[0], size)):
        for number in itertools.count(fewest_micro_batches(lengths)):
            low = high = _needed_ms(ordered, size, number, math.inf)
            while high < math.inf and _needed_ms(ordered, size, number, high) > high:
                low, high = high, 2 * high
            while high < math.inf and high - low > 1e-5 * high:
                middle = (low + high) / 2
                low, high = (middle, high) if _needed_ms(ordered, size, number, middle) > middle else (low, middle)
            best = min(best, number * FIXED_MS + low)
            if sum(ordered) <= ((number - 1) * GPUS + GPUS - size) * CAPACITY + ordered[0]:
                break  # more micro-batches only cost more
    return best


def _needed_ms(ordered: Sequence[int], size: int, number: int, given_ms: float) -> float:
    """The sum of all durations at least, if it is no more than ``given_ms`` and a group of ``size`` runs the longest.

    No micro-batch takes more than is given less what the others take, which hold the tokens that one has no memory for. In
    so much time a sequence needs a group of some size, and that takes all its members some time. Tokens for which there
    is no memory elsewhere share the group of the longest, at its price. Beside that group, GPUs hold no more than their
    memory does, at best the sequences with most work per token; the rest of that time they wait. All other work is spread.
    """
    longest, others = ordered[0], ordered[1:]
    elsewhere = sorted((least_ms(length) / length, length) for length in ordered)
    most_ms = given_ms - _of_first(elsewhere, sum(ordered) - GPUS * CAPACITY) / GPUS
    alone, sharing = sequence_ms(longest, size), max(0, sum(others) - (number * GPUS - size) * CAPACITY)
    least = [least_ms(length, most_ms) for length in others]
    if longest + sharing > size * CAPACITY or alone > most_ms or math.inf in least:
        return math.inf
    work = sorted(((ms / length, length) for ms, length in zip(least, others, strict=True)), reverse=True)
    prices = (
        (size * sequence_ms(length, size) - ms, length)
        for ms, length in zip(least, others, strict=True)
        if fits(length, size) and sequence_ms(length, size) <= most_ms
    )
    by_price = sorted((price / length, length) for price, length in prices)
    # the shorter a sequence, the less a token takes
    waiting = (GPUS - size) * (alone + sharing * sequence_ms(1, size)) - _of_first(work, (GPUS - size) * CAPACITY)
    return (sum(least) + size * alone + _of_first(by_price, sharing) + max(0.0, waiting)) / GPUS


def least_ms(length: int, most_ms: float = math.inf) -> float:
    """What a sequence takes all members of a group together, at least, if each has so much time; infinite: too little."""
    sizes = (size for size in SIZES if fits(length, size) and sequence_ms(length, size) <= most_ms)
    return min((size * sequence_ms(length, size) for size in sizes), default=math.inf)


def _of_first(priced: Sequence[tuple[float, int]], tokens: int) -> float:
    """What so many tokens cost, from the first on; each entry is a price for each of so many tokens."""
    total = 0.0
    for price, length in priced:
        held = min(tokens, length)
        total, tokens = total + price * held, tokens - held
    return total


def fits(length: int, size: int) -> bool:
    """Whether a group of ``size`` can hold a sequence."""
    return length <= size * CAPACITY


def fewest_micro_batches(lengths: Sequence[int]) -> int:
    """That can hold all tokens."""
    return math.ceil(sum(lengths) / (GPUS * CAPACITY))


def static_plan(lengths: Sequence[int], size: int = GPUS) -> list[MicroBatch] | None:
    """One size for all groups and micro-batches, the fewest into which everything goes; None if it does not."""
    fewest = fewest_micro_batches(lengths)
    for number in range(fewest, fewest + MORE_MICRO_BATCHES):
        plan = [_emptiest_fit(chunk, size) for chunk in chunks(lengths, number)]
        if all(plan):
            return [groups for groups in plan if groups]
    return None


def adaptive_plan(lengths: Sequence[int]) -> list[MicroBatch]:
    """The paper's "BatchAda": the best single size for this batch, over numbers of micro-batches too."""
    fewest, plans = fewest_micro_batches(lengths), []
    for size, number in itertools.product(SIZES, range(fewest, fewest + MORE_MICRO_BATCHES)):
        plan = [_emptiest_fit(chunk, size) for chunk in chunks(lengths, number)]
        plans += [[groups for groups in plan if groups]] if all(plan) else []
    return min(plans, key=lambda plan: sum(map(micro_batch_ms, plan)))


def _emptiest_fit(lengths: Sequence[int], size: int) -> MicroBatch | None:
    """From long to short into the group of one size that has most room; None where none has enough."""
    groups: list[list[int]] = [[] for _ in range(GPUS // size)]
    for length in sorted(lengths, reverse=True):
        fitting = [group for group in groups if sum(group) + length <= size * CAPACITY]
        if not fitting:
            return None
        min(fitting, key=sum).append(length)
    return [(size, group) for group in groups]


def chunks(lengths: Sequence[int], number: int) -> list[list[int]]:
    """The paper's blaster: neighbours by length, cut so that the micro-batch with most tokens has as few as can be."""
    ordered = sorted(lengths)
    low, high = max(max(ordered), math.ceil(sum(ordered) / number)), sum(ordered)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(ordered, middle)) <= number else (middle + 1, high)
    return _cut(ordered, low)


def _cut(ordered: Sequence[int], most: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    tokens = 0
    for length in ordered:
        if tokens + length > most:
            parts.append([])
            tokens = 0
        parts[-1].append(length)
        tokens += length
    return parts


def buckets(lengths: Sequence[int], most: int = BUCKETS) -> list[list[int]]:
    """At most so many runs of neighbours by length with the least sum of differences to the longest of their run.

    The paper's dynamic program: a run up to length j costs j's length times its size less its tokens.
    """
    ordered = np.sort(np.array(lengths))
    number = len(ordered)
    before = np.concatenate([[0], np.cumsum(ordered)])
    cost = np.full(number + 1, np.inf)
    cost[0] = 0.0
    cuts = []
    for _ in range(min(most, number)):
        reached, cut = np.full(number + 1, np.inf), np.zeros(number + 1, np.int64)
        for stop in range(1, number + 1):
            starts = np.arange(stop)
            total = cost[:stop] + ordered[stop - 1] * (stop - starts) - (before[stop] - before[:stop])
            cut[stop] = int(total.argmin())
            reached[stop] = total[cut[stop]]
        cost = reached
        cuts.append(cut)
    found, stop = [], number
    for cut in reversed(cuts):
        found.append(ordered[cut[stop] : stop].tolist())
        stop = cut[stop]
    return found[::-1]


class Program(NamedTuple):
    """The integer program of one micro-batch.

    Variables: how many sequences of each of Q buckets every one of P possible groups gets, [Q, P], which groups there are,
    [P], and when the last one ends, milliseconds, which is least.
    """

    rows: list[tuple[dict[int, float], float, float]]
    """Coefficients of variables, and what their sum lies between."""
    alike: list[tuple[dict[int, float], float, float]]
    """More of them, which take equal solutions out: groups of one size are used in order."""
    upper: list[float]
    """Of every variable; all begin at 0."""
    start: list[float] | None
    """The variables of the best plan with one size of groups, if buckets let there be one."""


Solver = Callable[[Program, float], list[float] | None]
"""Variables of the best solution found within so many seconds; None: it found none."""


def by_highs(program: Program, limit_s: float) -> list[float] | None:
    """By the solver of SciPy, with the rows that take equal solutions out, from nothing."""
    rows, variables = program.rows + program.alike, len(program.upper)
    entries = [(r, v, value) for r, (row, _, _) in enumerate(rows) for v, value in row.items()]
    r, v, values = zip(*entries, strict=True)
    matrix = coo_array((values, (r, v)), shape=(len(rows), variables))
    answer = milp(
        np.eye(1, variables, variables - 1).ravel(),
        integrality=np.append(np.ones(variables - 1), 0),
        bounds=Bounds(np.zeros(variables), np.array(program.upper)),
        constraints=LinearConstraint(matrix.tocsr(), [row[1] for row in rows], [row[2] for row in rows]),
        options={"time_limit": limit_s},
    )
    return None if answer.x is None else [float(value) for value in answer.x]


def by_scip(program: Program, limit_s: float) -> list[float] | None:
    """By the solver of the paper, from the best plan with one size of groups; the limit is of processor time."""
    solver = pywraplp.Solver.CreateSolver("SCIP")
    solver.SetSolverSpecificParametersAsString("timing/clocktype = 1\n")
    solver.SetTimeLimit(int(1e3 * limit_s))
    end = len(program.upper) - 1
    variables = [solver.IntVar(0, most, "") for most in program.upper[:end]]
    variables.append(solver.NumVar(0, program.upper[end], ""))
    for row, low, high in program.rows:
        constraint = solver.Constraint(low, high)
        for v, value in row.items():
            constraint.SetCoefficient(variables[v], value)
    solver.Minimize(variables[end])
    if program.start is not None:
        solver.SetHint(variables, program.start)
    if solver.Solve() not in (pywraplp.Solver.OPTIMAL, pywraplp.Solver.FEASIBLE):
        return None
    return [variable.solution_value() for variable in variables]


def program_of(found: Sequence[Sequence[int]]) -> Program:
    """The program of a micro-batch with these buckets, ascending inside; a sequence counts as the longest of its bucket."""
    bounds, number = [bucket[-1] for bucket in found], sum(map(len, found))
    share = len(found) * len(GROUPS)
    end = share + len(GROUPS)
    rows: list[tuple[dict[int, float], float, float]] = []
    for q, bucket in enumerate(found):
        every = range(q * len(GROUPS), (q + 1) * len(GROUPS))
        rows.append((dict.fromkeys(every, 1.0), len(bucket), len(bucket)))
    for p, size in enumerate(GROUPS):
        own = {q * len(GROUPS) + p: bound for q, bound in enumerate(bounds)}
        of_group = dict.fromkeys(own, 1.0)
        rows.append(({**{v: sequence_ms(bound, size) for v, bound in own.items()}, end: -1.0}, -math.inf, 0.0))
        rows.append(({v: float(bound) for v, bound in own.items()}, -math.inf, float(size * CAPACITY)))
        rows.append(({**of_group, share + p: -float(number)}, -math.inf, 0.0))
        rows.append(({**of_group, share + p: -1.0}, 0.0, math.inf))
    rows.append(({share + p: float(size) for p, size in enumerate(GROUPS)}, GPUS, GPUS))
    alike = [
        ({share + p - 1: 1.0, share + p: -1.0}, 0.0, math.inf)
        for p, (before, size) in enumerate(itertools.pairwise(GROUPS), 1)
        if before == size
    ]
    upper = [float(len(bucket)) if fits(bucket[-1], size) else 0.0 for bucket in found for size in GROUPS]
    return Program(rows, alike, [*upper, *[1.0] * len(GROUPS), math.inf], _start(found))


def _start(found: Sequence[Sequence[int]]) -> list[float] | None:
    """The variables of the best plan with one size of groups."""
    bounds = [bucket[-1] for bucket in found]
    best, best_ms = None, math.inf
    for size in SIZES:
        groups = _emptiest_fit([bound for bucket in found for bound in [bucket[-1]] * len(bucket)], size)
        if groups is None or not all(of_group for _, of_group in groups) or (ms := micro_batch_ms(groups)) >= best_ms:
            continue
        first = GROUPS.index(size)
        counts = np.zeros((len(found), len(GROUPS)))
        for p, (_, of_group) in enumerate(groups, first):
            for bound in of_group:
                counts[bounds.index(bound), p] += 1
        if [int(row.sum()) for row in counts] != [len(bucket) for bucket in found]:
            continue  # two buckets have the same longest sequence
        there = [float(first <= p < first + len(groups)) for p in range(len(GROUPS))]
        best, best_ms = [*counts.ravel().tolist(), *there, ms - FIXED_MS], ms
    return best


def program_plan(lengths: Sequence[int], limit_s: float, solver: Solver = by_highs) -> MicroBatch | None:
    """What the integer program makes of one micro-batch; None where no solution was found in time."""
    found = buckets(lengths)
    solution = solver(program_of(found), limit_s)
    if solution is None:
        return None
    counts = np.rint(solution[: len(found) * len(GROUPS)]).astype(int).reshape(len(found), len(GROUPS))
    groups: MicroBatch = [(size, []) for size in GROUPS]
    for bucket, row in zip(found, counts, strict=True):
        rest = iter(bucket)
        for p, count in enumerate(row):
            groups[p][1].extend(itertools.islice(rest, int(count)))
    return [group for group in groups if group[1]]


def flexsp_plan(
    lengths: Sequence[int], limit_s: float, solver: Solver = by_highs
) -> tuple[list[MicroBatch] | None, int]:
    """The best plan over numbers of micro-batches, and how many programs were solved.

    A number of micro-batches whose fixed times and evenly spread work alone exceed the best plan is left out.
    """
    best: list[MicroBatch] | None = None
    best_ms, solved, fewest = math.inf, 0, fewest_micro_batches(lengths)
    for number in range(fewest, fewest + MORE_MICRO_BATCHES):
        if bound_ms(lengths) + (number - fewest) * FIXED_MS >= best_ms:
            break
        plan: list[MicroBatch] = []
        for chunk in chunks(lengths, number):
            groups = program_plan(chunk, limit_s, solver)
            solved += 1
            if groups is None:
                break
            plan.append(groups)
        else:
            if (found_ms := sum(map(micro_batch_ms, plan))) < best_ms:
                best, best_ms = plan, found_ms
    return best, solved
