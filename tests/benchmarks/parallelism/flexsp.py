"""FlexSP (arXiv 2412.01523) restated: its costs and rules, its integer program, and the homogeneous plans it compares with.

None of this is its code. 64 GPUs; a micro-batch is cut into groups of a power of two of them, 2 or more, which share
sequences by heads; all wait for each other at its end. Times are milliseconds, those that the paper profiled for a model of
7B parameters on A100-40G. The program is solved by HiGHS in place of SCIP, and groups of one size are used in order, which
only takes equal solutions out.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

GPUS = 64
SIZES = (2, 4, 8, 16, 32, 64)
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
    """No plan under these rules is faster: fixed times, all work at its least, and waiting for the longest sequence.

    The work is spread evenly over as few micro-batches as memory allows. While a group runs the longest sequence, the
    other GPUs hold no more than their memory does, at best the sequences with most work per token; the rest of that time
    they wait.
    """
    ordered = sorted(lengths, reverse=True)
    least = [min(size * sequence_ms(length, size) for size in SIZES if fits(length, size)) for length in ordered]
    beside = sorted(zip(least[1:], ordered[1:], strict=True), key=lambda one: one[0] / one[1], reverse=True)
    waiting = math.inf
    for size in (size for size in SIZES if fits(ordered[0], size)):
        room, work = (GPUS - size) * CAPACITY, 0.0
        for work_ms, length in beside:
            held = min(room, length)
            work, room = work + work_ms * held / length, room - held
        alone = sequence_ms(ordered[0], size)
        waiting = min(waiting, GPUS * alone - least[0] - min(work, (GPUS - size) * alone))
    return fewest_micro_batches(lengths) * FIXED_MS + (sum(least) + max(0.0, waiting)) / GPUS


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


class _Program(NamedTuple):
    """Rows of an integer program: sums of coefficients times variables, and what they lie between."""

    rows: list[tuple[dict[int, float], float, float]]

    def constraint(self, variables: int) -> LinearConstraint:
        entries = [(r, v, value) for r, (row, _, _) in enumerate(self.rows) for v, value in row.items()]
        r, v, values = zip(*entries, strict=True)
        matrix = coo_array((values, (r, v)), shape=(len(self.rows), variables))
        return LinearConstraint(matrix.tocsr(), [row[1] for row in self.rows], [row[2] for row in self.rows])


def program_plan(lengths: Sequence[int], limit_s: float) -> MicroBatch | None:
    """The integer program of one micro-batch; None where no solution was found in time.

    Variables: how many sequences of each bucket every possible group gets, which groups there are, and the end.
    """
    found = buckets(lengths)
    bounds = [bucket[-1] for bucket in found]
    sizes = [size for size in SIZES for _ in range(GPUS // size)]
    share = len(found) * len(sizes)
    end = share + len(sizes)
    program = _Program([])
    for q, bucket in enumerate(found):
        program.rows.append((dict.fromkeys(range(q * len(sizes), (q + 1) * len(sizes)), 1.0), len(bucket), len(bucket)))
    for p, size in enumerate(sizes):
        of_group = {q * len(sizes) + p: 1.0 for q in range(len(found))}
        times = {q * len(sizes) + p: sequence_ms(bounds[q], size) for q in range(len(found))}
        tokens = {q * len(sizes) + p: float(bounds[q]) for q in range(len(found))}
        program.rows.append(({**times, end: -1.0}, -np.inf, 0.0))
        program.rows.append((tokens, -np.inf, float(size * CAPACITY)))
        program.rows.append(({**of_group, share + p: -float(len(lengths))}, -np.inf, 0.0))
        program.rows.append(({**of_group, share + p: -1.0}, 0.0, np.inf))
        if p and sizes[p - 1] == size:
            program.rows.append(({share + p - 1: 1.0, share + p: -1.0}, 0.0, np.inf))
    program.rows.append(({share + p: float(size) for p, size in enumerate(sizes)}, GPUS, GPUS))
    upper = [len(found[q]) if fits(bounds[q], size) else 0 for q in range(len(found)) for size in sizes]
    answer = milp(
        np.eye(1, end + 1, end).ravel(),
        integrality=np.append(np.ones(end), 0),
        bounds=Bounds(np.zeros(end + 1), np.array([*upper, *[1] * len(sizes), np.inf])),
        constraints=program.constraint(end + 1),
        options={"time_limit": limit_s},
    )
    if answer.x is None:
        return None
    counts = np.rint(answer.x[:share]).astype(int).reshape(len(found), len(sizes))
    groups: MicroBatch = [(size, []) for size in sizes]
    for bucket, row in zip(found, counts, strict=True):
        rest = iter(bucket)
        for p, count in enumerate(row):
            groups[p][1].extend(itertools.islice(rest, int(count)))
    return [group for group in groups if group[1]]


def flexsp_plan(lengths: Sequence[int], limit_s: float) -> tuple[list[MicroBatch] | None, int]:
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
            groups = program_plan(chunk, limit_s)
            solved += 1
            if groups is None:
                break
            plan.append(groups)
        else:
            if (found_ms := sum(map(micro_batch_ms, plan))) < best_ms:
                best, best_ms = plan, found_ms
    return best, solved
