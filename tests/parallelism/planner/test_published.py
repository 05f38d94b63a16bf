"""Published figures, computed again: FLOPs, bubbles, orders of micro-batches, FlexSP, ByteScale, WLB-LLM.

Every test prints the deviation of each figure (``pytest -s``). The systems are our restatements from their papers, in as few
lines as a comparison needs. Lengths are drawn from published quantiles and tables. A bound that is wider than one
would like says in its test why.
"""

import bisect
import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest

from evermesh.parallelism import BatchPlan, Certificate, CostModel, Layout, MicroBatch, ModelShape, Piece
from evermesh.parallelism.cost import Parts, Sharing
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.pipeline import PipelineSchedule
from evermesh.parallelism.pipeline.simulator import StageSeconds, replay
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.simulator import Scenario, simulate_events


def report(what: str, found: float, published: float) -> float:
    """Print a figure next to the published one; returns its relative deviation."""
    deviation = found / published - 1
    print(f"{what}: {found:.4g}, published {published:.4g}, {deviation:+.1%}")
    return deviation


# ---- FLOPs


def gpt(hidden: int, layers: int, heads: int, vocabulary: int) -> ModelShape:
    """The shape of a GPT: its two matrices of 4 h are as many FLOPs as three of 8/3 h."""
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=8 * hidden // 3,
        vocabulary=vocabulary,
    )


def flops(shape: ModelShape, sequences: int, length: int, *, attention: float, forwards: float = 3.0) -> float:
    """FLOPs of a step, ``forwards`` forward passes long; ``attention`` is the share of all pairs that counts."""
    products = shape.linear_flops_per_token() * length
    return forwards * sequences * (products + attention * shape.attention_flops_per_pair() * length**2)


@pytest.mark.parametrize(
    ("system", "seconds", "attention", "published"),
    [("Megatron-LM", 8.57, 1.0, 0.412), ("MegaScale", 6.34, 0.5, 0.552)],
)
def test_flops_of_megascale_table_2_give_its_utilization(
    system: str, seconds: float, attention: float, published: float
) -> None:
    """12,288 A100, 175B, batch 6,144. MegaScale's own rows fit with half the attention, as its sliding window has."""
    per_step = flops(gpt(12_288, 96, 96, 51_200), 6144, 2048, attention=attention)
    found = per_step / seconds / 12_288 / 312e12
    report(f"MFU of {system}", found, published)
    assert found == pytest.approx(published, abs=0.0025)


@pytest.mark.parametrize(("nodes", "seconds", "published"), [(280, 60.1, 126), (350, 50.2, 121), (420, 44.4, 113)])
def test_flops_of_mt_nlg_give_its_throughput(nodes: int, seconds: float, published: float) -> None:
    """530B, batch 1,920, with full recomputation: four forward passes of layers, three of logits."""
    shape = gpt(20_480, 105, 128, 51_200)
    logits = 2 * shape.hidden * shape.vocabulary * 2048 * 1920
    found = (flops(shape, 1920, 2048, attention=1.0, forwards=4.0) - logits) / seconds / (nodes * 8) / 1e12
    assert abs(report(f"TFLOP/s per GPU on {nodes} nodes", found, published)) < 0.006


# ---- pipelines


@pytest.mark.parametrize(("ranks", "number"), [(2, 8), (4, 8), (8, 32), (8, 8), (16, 64)])
def test_bubbles_are_the_published_fractions(ranks: int, number: int) -> None:
    """(p - 1) / (v m + p - 1) of the time (Narayanan et al., arXiv 2104.04473; GPipe with v = 1)."""
    for name, virtual in (("1f1b", 1), ("gpipe", 1), ("interleaved-1f1b", 2), ("interleaved-1f1b", 4)):
        schedule = PipelineSchedule(name, ranks, virtual)  # type: ignore[arg-type]
        seconds = [[[StageSeconds(1.0, 1.0, 1.0)] * schedule.num_stages] * number]
        found = 1 - 3.0 * number * virtual / replay(schedule, seconds).makespan_s
        deviation = report(
            f"{name}, {virtual} virtual, p {ranks}, m {number}", found, (ranks - 1) / (virtual * number + ranks - 1)
        )
        assert abs(deviation) < 1e-9


def _pyramid(sizes: list[float]) -> list[float]:
    ascending = sorted(sizes)
    return ascending[::2] + ascending[1::2][::-1]


def _valley(sizes: list[float]) -> list[float]:
    descending = sorted(sizes, reverse=True)
    return descending[::2] + descending[1::2][::-1]


ORDERS: dict[str, Callable[[list[float]], list[float]]] = {
    "random": list,
    "descending": lambda sizes: sorted(sizes, reverse=True),
    "ascending": sorted,
    "pyramid": _pyramid,
    "valley": _valley,
}


@pytest.mark.parametrize(
    ("name", "spread", "number", "published"),
    [
        ("log-normal .3", 0.3, 32, (1.47, 1.19, 1.19, 1.12, 1.35)),
        ("log-normal .7", 0.7, 32, (2.38, 1.59, 1.55, 1.47, 2.02)),
        ("log-normal .7", 0.7, 64, (2.22, 1.34, 1.32, 1.25, 1.57)),
        ("15 % of size 8", None, 32, (2.92, 1.70, 1.70, 1.70, 2.37)),
    ],
)
def test_orders_of_unequal_micro_batches_rank_as_measured_before(
    name: str, spread: float | None, number: int, published: tuple[float, ...]
) -> None:
    """1F1B, 8 stages, backward twice as long: makespan over sum + 7 times the smallest, mean of 16 draws (published: 40)."""
    ratios: dict[str, list[float]] = {order: [] for order in ORDERS}
    for seed in range(16):
        draw = random.Random(seed)
        if spread is None:
            sizes = [8.0 if draw.random() < 0.15 else 1.0 for _ in range(number)]
        else:
            sizes = [draw.lognormvariate(0, spread) for _ in range(number)]
        bound = 3 * (sum(sizes) + 7 * min(sizes))
        for order, arrange in ORDERS.items():
            seconds = [[[StageSeconds(size, size, size)] * 8 for size in arrange(sizes)]]
            ratios[order].append(replay(PipelineSchedule("1f1b", 8), seconds).makespan_s / bound)
    found = {order: statistics.mean(of_order) for order, of_order in ratios.items()}
    for (order, ratio), expected in zip(found.items(), published, strict=True):
        assert abs(report(f"{name}, m {number}, {order}", ratio, expected)) < 0.2
    best = min(found["descending"], found["ascending"])
    assert found["pyramid"] <= best * 1.01
    assert best < found["valley"]
    assert best < found["random"]


# ---- lengths


class Quantiles(NamedTuple):
    """A distribution of lengths; between quantiles it is log-uniform."""

    shares: tuple[float, ...]
    lengths: tuple[float, ...]

    def batch(self, draw: random.Random, number: int) -> list[int]:
        """So many lengths in random order, one from each of as many equal shares of the distribution."""
        lengths = [self._at((index + draw.random()) / number) for index in range(number)]
        draw.shuffle(lengths)
        return lengths

    def _at(self, share: float) -> int:
        above = min(bisect.bisect(self.shares, share), len(self.shares) - 1)
        (low, high), (shortest, longest) = self.shares[above - 1 : above + 1], self.lengths[above - 1 : above + 1]
        return max(1, round(shortest * (longest / shortest) ** ((share - low) / (high - low))))


_TAIL = (0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999, 0.99999, 1.0)
WIKIPEDIA = Quantiles(
    (0.0, 0.01, 0.05, 0.1, *_TAIL),
    (10, 39, 67, 87, 146, 347, 862, 2112, 3720, 7087, 10919, 15986, 37353, 51510, 101537, 230941, 1823777),
)
"""Published with FlexSP's code: quantiles of a million articles."""
WLB = Quantiles(
    (0.0, 0.01, 0.05, 0.1, *_TAIL),
    (10, 63, 324, 646, 1606, 3227, 4832, 5784, 6110, 10078, 26058, 69097, 119793, 122617, 124235, 124817, 124913),
)
"""Published with DistCA's code: lengths like those of WLB-LLM."""


def byted(draw: random.Random, num_tokens: int) -> list[int]:
    """Lengths by ByteScale's figure 4: shares of tokens by bucket, log-uniform inside."""
    shares = (7.6, 7.6, 8.8, 10.2, 11.4, 10.4, 7.6, 7.6, 7.3, 9.7, 12.1)
    buckets = [(256, 2048), *((2**power, 2 ** (power + 1)) for power in range(11, 21))]
    weights = [share * math.log(high / low) / (high - low) for share, (low, high) in zip(shares, buckets, strict=True)]
    lengths: list[int] = []
    left = num_tokens
    while left > 0:
        low, high = draw.choices(buckets, weights)[0]
        lengths.append(round(low * (high / low) ** draw.random()))
        left -= lengths[-1]
    return lengths


def test_drawn_lengths_have_the_published_means_and_shares() -> None:
    draw = random.Random(0)
    lengths = WIKIPEDIA.batch(draw, 200_000)
    assert abs(report("mean of Wikipedia", statistics.mean(lengths), 1013.6)) < 0.06
    assert abs(report("mean of WLB", statistics.mean(WLB.batch(draw, 100_000)), 3961.8)) < 0.1
    drawn = byted(draw, 300_000_000)
    long = [length for length in drawn if length > 2**17]
    report("tokens over 128K of Byted", sum(long) / sum(drawn), 0.443)
    assert 0.36 < sum(long) / sum(drawn) < 0.47
    longest = [length for length in drawn if length > 2**20]  # some thirty: this share is known to a fifth
    assert abs(report("longest bucket of Byted", sum(longest) / sum(drawn), 0.121)) < 0.4


# ---- FlexSP, figure 4


class FlexSP(NamedTuple):
    """Its cost model of a group of GPUs that divide heads, with the coefficients in its code (milliseconds, tokens, MB)."""

    quadratic: float
    linear: float
    fixed: float
    mb_per_token: float
    layers: int
    hidden: int

    @property
    def capacity(self) -> float:
        """Tokens of one GPU, next to its part of the states."""
        states_mb = 16 * 12 * self.layers * self.hidden**2 / 64 / 2**20
        return (30 * 1024 - states_mb) / self.mb_per_token

    def least_degree(self, tokens: int) -> int:
        """Fewest GPUs, a power of two, that hold so many tokens."""
        return next(degree for degree in (1, 2, 4, 8, 16, 32, 64) if tokens <= degree * self.capacity)

    def group_s(self, tokens: int, squares: int, degree: int) -> float:
        """Seconds of sequences on a group, from the sums of their lengths and of the squares of these."""
        compute = (self.quadratic * squares + self.linear * tokens) / degree
        sent_mb = 4 * 2 * self.layers * self.hidden * tokens * 2 / 2**20 / degree
        return (compute + (sent_mb / _GB_PER_S[degree] if degree > 1 else 0.0)) / 1000


_GB_PER_S = {2: 119.54, 4: 104.07, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}
FLEXSP = {
    "7B": FlexSP(5.128e-6, 0.1839576, 629.3563, 4.480, 32, 4096),
    "13B": FlexSP(9.2852e-6, 0.3060189, 1132.5632, 4.220, 40, 5120),
    "30B": FlexSP(15.4262e-6, 0.8035742, 2789.3644, 3.417, 60, 6656),
}


def _spread(model: FlexSP, lengths: Sequence[int], degrees: Sequence[int]) -> float:
    """Seconds of a micro-batch whose sequences go, longest first, to the group that is done first; inf: one does not fit."""
    tokens, squares = [0] * len(degrees), [0] * len(degrees)
    for length in sorted(lengths, reverse=True):
        options = [
            (model.group_s(tokens[index] + length, squares[index] + length**2, degree), index)
            for index, degree in enumerate(degrees)
            if tokens[index] + length <= model.capacity * degree
        ]
        if not options:
            return float("inf")
        _, index = min(options)
        tokens[index] += length
        squares[index] += length**2
    return max(map(model.group_s, tokens, squares, degrees)) + model.fixed / 1000


def _micro_batches(lengths: Sequence[int], number: int) -> list[list[int]]:
    """Contiguous parts of the sorted lengths with about equal tokens, as FlexSP's blaster cuts them."""
    parts: list[list[int]] = [[]]
    share, held = sum(lengths) / number, 0
    for length in sorted(lengths):
        if held + length > share * len(parts) and parts[-1] and len(parts) < number:
            parts.append([])
        parts[-1].append(length)
        held += length
    return parts


def _dealt(lengths: Sequence[int], number: int) -> list[list[int]]:
    """Longest first to the part with fewest tokens."""
    parts: list[list[int]] = [[] for _ in range(number)]
    for length in sorted(lengths, reverse=True):
        min(parts, key=sum).append(length)
    return parts


def one_degree_s(model: FlexSP, lengths: Sequence[int], degree: int) -> float:
    """A step with groups of one size, in as few micro-batches as fit; inf: the longest does not."""
    if max(lengths) > degree * model.capacity:
        return float("inf")
    number = 0
    while True:
        number += 1
        seconds = sum(_spread(model, part, [degree] * (64 // degree)) for part in _dealt(lengths, number))
        if seconds < float("inf"):
            return seconds


def mixed_degrees_s(model: FlexSP, lengths: Sequence[int]) -> float:
    """A step whose micro-batches each have one large group and the rest small: a stand-in for FlexSP's solver."""
    first = math.ceil(sum(lengths) / (64 * model.capacity))
    steps = []
    for number in range(first, first + 3):
        total = 0.0
        for part in _micro_batches(lengths, number):
            large = model.least_degree(max(part))
            layouts = [
                [size] + [small] * ((64 - size) // small) for size in _POWERS if size >= large for small in _POWERS
            ]
            total += min(_spread(model, part, degrees) for degrees in layouts if degrees[0] >= degrees[-1])
        steps.append(total)
    return min(steps)


_POWERS = (2, 4, 8, 16, 32, 64)
"""Sizes of groups; its code leaves out 1."""


@pytest.mark.parametrize(
    ("name", "context", "deepspeed", "adaptive", "flexsp"),
    [
        ("7B", 192, 8.0, 6.0, 4.65),
        ("7B", 384, 8.2, 6.2, 5.6),
        ("13B", 192, 14.0, 10.7, 8.8),
        ("13B", 384, 14.7, 12.2, 10.3),
        ("30B", 192, 29.5, 24.0, 18.0),
        ("30B", 384, 32.6, 27.6, 21.3),
    ],
)
def test_flexsp_figure_4_wikipedia(name: str, context: int, deepspeed: float, adaptive: float, flexsp: float) -> None:
    """64 A100, 512 sequences: groups of 64, groups of the best one size that holds the longest, groups of mixed sizes.

    Its code's coefficients give a fifth to two fifths less than its figure, for all three systems and models. What is missing
    is how many tokens a batch of the figure holds: 768 of the published lengths in place of 512, 1.5 times the tokens, give
    all nine figures at 192K within 13 %; no constant of the costs does that. So seconds have a wide bound; the gain of
    mixed sizes is held to 15 % at 192K. At 384K it hangs on the one or two articles over 192K that a batch may have, which
    two batches drawn evenly from quantiles do not show: 30 %.
    """
    model = FLEXSP[name]
    found: dict[str, list[float]] = {"DeepSpeed": [], "BatchAda": [], "FlexSP": []}
    for seed in range(2):
        lengths = [length for length in WIKIPEDIA.batch(random.Random(seed), 512) if length <= context * 1024]
        widest = model.least_degree(context * 1024)
        found["DeepSpeed"].append(one_degree_s(model, lengths, widest))
        found["BatchAda"].append(min(one_degree_s(model, lengths, degree) for degree in _POWERS))
        found["FlexSP"].append(mixed_degrees_s(model, lengths))
    means = {system: statistics.mean(seconds) for system, seconds in found.items()}
    for (system, seconds), published in zip(means.items(), (deepspeed, adaptive, flexsp), strict=True):
        assert -0.45 < report(f"{system}, GPT-{name}, {context}K", seconds, published) < 0.15
    assert means["DeepSpeed"] > means["BatchAda"] > means["FlexSP"]
    speedup = report("DeepSpeed over FlexSP", means["DeepSpeed"] / means["FlexSP"], deepspeed / flexsp)
    assert abs(speedup) < (0.15 if context == 192 else 0.3)


# ---- ByteScale, figure 18


class _WithRingStart(CostModel):
    """With fixed seconds for every ring, whatever its size."""

    ring_s_fixed: float = 0.0

    def parts(self, length: int, sharing: Sharing, *, recomputed: bool = False) -> Parts:
        found = super().parts(length, sharing, recomputed=recomputed)
        return found if sharing.ring == 1 else found._replace(steps=found.steps + self.ring_s_fixed)


CAPACITY, GPUS, LONGEST_RING = 8192, 1024, 256
_STATIC_MS, _DYNAMIC_MS, _FEED_FORWARD_MS = 405.0, 110.0, 9.7
"""Of one layer, forward: attention on 256 ranks, attention of a sequence on 39 ranks, the rest of 8K tokens."""
_STEP_MS = (_STATIC_MS - _DYNAMIC_MS) / (255 - 38)
BYTESCALE = _WithRingStart(
    token_s=_FEED_FORWARD_MS * 1e-3 / CAPACITY,
    pair_s=4 * 4096 / 300e12,  # 7B, at 300 TFLOP/s
    ring_token_s=_STEP_MS * 1e-3 / CAPACITY,
    ring_s_fixed=(_STATIC_MS - 255 * _STEP_MS) * 1e-3,
)
"""Seconds of one layer forward; all others cost as much, so ratios are those of steps."""
Unit = tuple[tuple[int, ...], int]
"""Sequences, and how many ranks they need."""


def _units(lengths: Sequence[int], order: Sequence[int]) -> list[Unit]:
    """Long sequences alone on as few ranks as hold them, short ones packed in ``order``."""
    units: list[Unit] = []
    pack: list[int] = []
    for sequence in order:
        if lengths[sequence] > CAPACITY:
            units.append(((sequence,), -(-lengths[sequence] // CAPACITY)))
        elif sum(lengths[other] for other in pack) + lengths[sequence] > CAPACITY:
            units.append((tuple(pack), 1))
            pack = [sequence]
        else:
            pack.append(sequence)
    return [*units, (tuple(pack), 1)]


def _simulated_s(lengths: Sequence[int], placed: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> float:
    found: list[list[MicroBatch]] = [[] for _ in range(GPUS)]
    for sequences, ring in placed:
        for index, rank in enumerate(ring):
            pieces = (Piece(s, share_of(lengths[s], len(ring), index).ranges(), ring) for s in sequences)
            found[rank].append(MicroBatch(tuple(pieces)))
    plan = BatchPlan(
        tuple(lengths), CAPACITY, tuple(map(tuple, found)), Certificate(0.0, 0.0, "nothing"), "theirs", 0, 0
    )
    return simulate_events(
        plan, Layout(hdp=GPUS, capacity=CAPACITY), BYTESCALE, Scenario(Pool.of(GPUS))
    ).timeline.makespan_s


def _naive_s(lengths: Sequence[int], draw: random.Random) -> float:
    """Algorithm 1: units in the order they come, on the next free ranks, round after round."""
    units = _units(lengths, range(len(lengths)))
    draw.shuffle(units)
    placed, first = [], 0
    for sequences, size in units:
        first = first if first + size <= GPUS else 0
        placed.append((sequences, tuple(range(first, first + size))))
        first = (first + size) % GPUS
    return _simulated_s(lengths, placed)


def _balanced_s(lengths: Sequence[int]) -> float:
    """Algorithm 2 in the limit of many buckets: longest first to the ranks with least time."""
    units = _units(lengths, sorted(range(len(lengths)), key=lambda sequence: -lengths[sequence]))
    times, placed = [0.0] * GPUS, []
    for sequences, size in sorted(units, key=lambda unit: -unit[1]):
        ranks = sorted(range(GPUS), key=lambda rank: (times[rank], rank))[:size]
        cost = sum(BYTESCALE.shared_s(lengths[sequence], Sharing(size)) for sequence in sequences)
        end = max(times[rank] for rank in ranks) + cost
        for rank in ranks:
            times[rank] = end
        placed.append((sequences, tuple(sorted(ranks))))
    return _simulated_s(lengths, placed)


def _static_s(lengths: Sequence[int]) -> float:
    """Packs of 2M tokens, in order, on rings of 256; four at a time."""
    packs, held = 1, 0
    for length in lengths:
        if held + length > LONGEST_RING * CAPACITY:
            packs, held = packs + 1, 0
        held += length
    return -(-packs * LONGEST_RING // GPUS) * (_STATIC_MS + _FEED_FORWARD_MS) * 1e-3


def test_bytescale_figure_18() -> None:
    """7B, Byted to 2M, 32M tokens, 1,024 GPUs: 8m40s static, 4m32s naive, 2m37s balanced.

    The figure's 8 micro-batches of 256 ranks would be 67M tokens; here the batch is packed into as many as it needs.
    """
    batches = [byted(random.Random(seed), 32_000_000) for seed in range(4)]
    static = statistics.mean(map(_static_s, batches))
    naive = statistics.mean(_naive_s(lengths, random.Random(0)) for lengths in batches)
    balanced = statistics.mean(map(_balanced_s, batches))
    assert abs(report("static over naive", static / naive, 520 / 272)) < 0.25
    assert abs(report("static over balanced", static / balanced, 520 / 157)) < 0.25
    report("naive over balanced", naive / balanced, 272 / 157)


# ---- WLB-LLM, table 2


WLB_CAPACITY, WLB_MICRO_BATCHES = 131_072, 4


class _Packed:
    """Micro-batches that are filled with documents."""

    def __init__(self, number: int, most_tokens: float) -> None:
        self.work, self.tokens, self.most_tokens = [0.0] * number, [0] * number, most_tokens

    def add(self, length: int) -> bool:
        """Into that with least work, or else that with fewest tokens; false: it fits into neither (Algorithm 1)."""
        for loads in (self.work, self.tokens):
            index = min(range(len(loads)), key=lambda index: (loads[index], index))
            if self.tokens[index] + length <= self.most_tokens:
                self.tokens[index] += length
                self.work[index] += _work(length)
                return True
        return False


def _work(length: int) -> float:
    """Forward FLOPs of a document in LLaMA-7B; causal attention."""
    return LLAMA_7B.linear_flops_per_token() * length + LLAMA_7B.attention_flops_per_pair() * length**2 / 2


LLAMA_7B = ModelShape(hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, ffn=11_008, vocabulary=32_000)


def _imbalance(work: Sequence[float]) -> float:
    """Largest micro-batch over the mean, mean of all steps."""
    steps = [work[first : first + WLB_MICRO_BATCHES] for first in range(0, len(work), WLB_MICRO_BATCHES)]
    return statistics.mean(
        max(step) * WLB_MICRO_BATCHES / sum(step) for step in steps if len(step) == WLB_MICRO_BATCHES
    )


def _in_order(documents: Sequence[int]) -> list[list[int]]:
    """Micro-batches of the documents as they come."""
    found: list[list[int]] = [[]]
    held = 0
    for length in documents:
        if held + length > WLB_CAPACITY:
            found.append([])
            held = 0
        found[-1].append(length)
        held += length
    return found


def _greedy(micro_batches: Sequence[list[int]], batches: int) -> float:
    """The documents of several steps, balanced among all their micro-batches; alike ones share a step."""
    together, work = WLB_MICRO_BATCHES * batches, []
    for first in range(0, len(micro_batches) - together + 1, together):
        packed = _Packed(together, WLB_CAPACITY)
        documents = [length for part in micro_batches[first : first + together] for length in part]
        dropped = [length for length in sorted(documents, reverse=True) if not packed.add(length)]
        assert sum(dropped) < 0.01 * sum(documents)
        work += sorted(packed.work)
    return _imbalance(work)


def _delayed(micro_batches: Sequence[list[int]], queues: int) -> float:
    """WLB-LLM: documents in the upper parts of the range wait in queues until there is one for every micro-batch."""
    waiting: list[list[int]] = [[] for _ in range(queues)]
    # most tokens of a micro-batch: as long as memory allows, here a quarter more than the context
    left: list[int] = []
    work: list[float] = []
    for first in range(0, len(micro_batches) - WLB_MICRO_BATCHES + 1, WLB_MICRO_BATCHES):
        documents, left = left, []
        for length in (length for part in micro_batches[first : first + WLB_MICRO_BATCHES] for length in part):
            level = queues - 1 - math.floor(math.log2(WLB_CAPACITY / length))
            (waiting[min(level, queues - 1)] if level >= 0 else documents).append(length)
        for queue in waiting:
            if len(queue) >= WLB_MICRO_BATCHES:
                documents += [queue.pop(0) for _ in range(WLB_MICRO_BATCHES)]
        packed = _Packed(WLB_MICRO_BATCHES, 1.25 * WLB_CAPACITY)
        left += [length for length in sorted(documents, reverse=True) if not packed.add(length)]
        work += packed.work
    return _imbalance(work)


def test_wlb_llm_table_2() -> None:
    """7B, 128K, 4 micro-batches: as they come; balanced over 1, 2, 4, 8 steps; with 1, 2, 3 queues for long documents."""
    documents = WLB.batch(random.Random(0), 40_000)
    micro_batches = _in_order(documents)
    original = _imbalance([sum(map(_work, part)) for part in micro_batches])
    assert abs(report("original", original, 1.44)) < 0.05 / 1.44
    for batches, published in ((1, 1.41), (2, 1.22), (4, 1.11), (8, 1.08)):
        assert abs(report(f"greedy over {batches}", _greedy(micro_batches, batches), published)) < 0.05 / published
    for queues, published in ((1, 1.24), (2, 1.05), (3, 1.05)):
        deviation = report(f"WLB with {queues} queues", _delayed(micro_batches, queues), published)
        # which lengths its one queue takes is not published; that of documents over half the context is better than theirs
        assert queues == 1 or abs(deviation) < 0.05 / published
