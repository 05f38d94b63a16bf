"""Matrix products whose result is known to the last bit: wrong arithmetic, and a device that is slower than its siblings.

Entries are small whole numbers, so that every order of additions gives the same exact sum in float32 (below 2^24), also
with bfloat16 factors. The factors come from a recurrence, their product's digest from arithmetic with whole numbers.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from evermesh.fault.health.verdicts import Verdict

SIZE = 512
DIGEST = "645942e69273f5704931fbf1348d2cca4977c4c4832a1a0d24431ff60eb5319f"
"""SHA-256 of the product, as 64-bit whole numbers, rows first, little-endian."""
_LARGEST = 7
_TILES = 16
"""On a GPU the factors are repeated so often in each direction: 8,192 rows. Sums stay below 2^24."""
_SLOW = 0.85
"""Of the median of its siblings."""


class Timing(NamedTuple):
    """What one device did."""

    device: str
    flops_per_s: float
    wrong: int
    """Entries that differ from the known result, over all repetitions."""
    where: str
    """The first of them."""


def factors() -> tuple[np.ndarray, np.ndarray]:
    """Two matrices of whole numbers from -7 to 7, ``SIZE`` x ``SIZE``, int64; the same everywhere."""
    state = np.arange(1, SIZE * SIZE + 1, dtype=np.uint64)
    found = []
    for _ in range(2):
        for shift, way in ((13, 1), (7, -1), (17, 1)):  # xorshift, all entries at once
            state = state ^ (state << np.uint64(shift) if way > 0 else state >> np.uint64(shift))
        found.append((state % np.uint64(2 * _LARGEST + 1)).astype(np.int64).reshape(SIZE, SIZE) - _LARGEST)
    return found[0], found[1]


def digest(product: np.ndarray) -> str:
    """Of a product of whole numbers."""
    return hashlib.sha256(np.ascontiguousarray(product, dtype="<i8").tobytes()).hexdigest()


def probe_matrices(budget_s: float = 1.0) -> list[Verdict]:
    """Multiply on the CPU and on every CUDA device, each for ``budget_s`` seconds."""
    a, b = factors()
    known = torch.from_numpy(a).double() @ torch.from_numpy(b).double()  # exact up to 2^53
    if digest(known.to(torch.int64).numpy()) != DIGEST:  # the processor itself is wrong; what others do says nothing
        reason = "the known product, in double precision, has another digest than everywhere else"
        return [Verdict("arithmetic on cpu", "bad", reason, {}, "take the node out and have the processor looked at")]
    timings = [measure(torch.device("cpu"), a, b, known, budget_s)]
    count = torch.cuda.device_count()
    timings += [measure(torch.device("cuda", index), a, b, known, budget_s) for index in range(count)]
    return list(judge(timings))


def measure(device: torch.device, a: np.ndarray, b: np.ndarray, known: torch.Tensor, budget_s: float) -> Timing:
    """Multiply until the time is over, and compare every result."""
    tiles, dtype = (1, torch.float32) if device.type == "cpu" else (_TILES, torch.bfloat16)
    left, right = (torch.from_numpy(x).to(device, dtype).repeat(tiles, tiles) for x in (a, b))
    expected = (known * tiles).to(device, torch.float32).repeat(tiles, tiles).to(dtype)
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # partial sums are to be exact
    durations: list[float] = []
    wrong, where = 0, ""
    until = time.monotonic() + budget_s
    try:
        while not durations or time.monotonic() < until:
            began_s = time.perf_counter()
            product = left @ right
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            durations.append(time.perf_counter() - began_s)
            different = count_different(product, expected)
            wrong += different[0]
            where = where or different[1]
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before
    side = SIZE * tiles
    return Timing(str(device), 2.0 * side**3 / median(durations), wrong, where)


def count_different(product: torch.Tensor, expected: torch.Tensor) -> tuple[int, str]:
    """How many entries differ, and the first one in words."""
    if torch.equal(product, expected):
        return 0, ""
    places = (product != expected).nonzero()
    row, column = (int(index) for index in places[0])
    return len(places), f"row {row}, column {column}: {product[row, column]:g} instead of {expected[row, column]:g}"


def judge(timings: Sequence[Timing]) -> Iterator[Verdict]:
    """Pure. GPUs are compared with each other; a processor has no sibling."""
    usual = median([t.flops_per_s for t in timings if t.device != "cpu"] or [0.0])
    for timing in timings:
        check, numbers = (
            f"arithmetic on {timing.device}",
            {"flops_per_s": timing.flops_per_s, "wrong": float(timing.wrong)},
        )
        speed = f"{timing.flops_per_s / 1e9:,.0f} GFLOP/s"
        if timing.wrong:
            reason = f"{timing.wrong} entries of products are wrong: {timing.where}"
            yield Verdict(check, "bad", reason, numbers, "take the node out: it computes nonsense without an error")
        elif timing.device != "cpu" and timing.flops_per_s < _SLOW * usual:
            reason = f"{speed}, and {usual / 1e9:,.0f} on most GPUs here"
            yield Verdict(check, "warn", reason, numbers, "nvidia-smi -q -d PERFORMANCE tells what slows it down")
        else:
            yield Verdict(check, "ok", f"exact, {speed}", numbers)
