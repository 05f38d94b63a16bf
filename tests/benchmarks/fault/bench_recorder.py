"""What the recorder adds to a collective and to a step, next to what else is there to watch collectives.

Per collective: microseconds of the call path, the 5th percentile over blocks of 100 calls, from rounds in which every way
takes its turn; wall time on the ``fake`` backend, which communicates nothing, and processor time of the calling thread on
gloo with one rank, where torch's flight recorder and its DETAIL mode work. Per step: a small model on gloo ranks, recording
on and off in turn, two steps each, ``PAIRS`` (2000) times; wall time. The spread of these rows is the width of their 95 %
interval. Where the kernel permits it, ranks and the threads of gloo have real-time priority, gloo's the higher: otherwise
the scheduler's slices, longer than a step, are most of what a step takes, and differ by 40 % from one to the next.
"""

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from evermesh.checkpoint.background.memory import FOLDER
from evermesh.fault.recorder.measuring import start_fake_group, times_us
from evermesh.fault.recorder.native.building import build_tap
from evermesh.fault.recorder.recorder import Recorder, Wanted
from evermesh.fault.recorder.ring import RingSpec
from tests.benchmarks.harness import Row, exact_row
from tests.cluster import run_ranks

_ROUNDS, _BLOCKS = 6, 60
_PAIRS, _STEPS, _WARM = int(os.environ.get("PAIRS", "2000")), 2, 1
_WAYS: dict[str, tuple[Wanted, bool, float | None]] = {
    "native, start": ("native", False, 0.5),
    "native, start and end": ("native", True, 1.0),
    "Python": ("python", True, 1.5),
}
"""The tap, whether it stamps ends, and the goal in microseconds."""


def run() -> list[Row]:
    """All rows."""
    tap = build_tap()
    assert not tap.refused, tap.refused
    fake, gloo = _in_child("fake"), _in_child("gloo")
    without_flight_recorder = _in_child("gloo", TORCH_FR_BUFFER_SIZE="0", TORCH_NCCL_TRACE_BUFFER_SIZE="0")
    detail = _in_child("gloo", TORCH_DISTRIBUTED_DEBUG="DETAIL")
    peers = {
        "callback of a future": fake["callback"] - fake["base, in background"],
        "flight recorder (gloo)": gloo["base"] - without_flight_recorder["base"],
        "DETAIL (gloo)": detail["base"] - gloo["base"],
    }
    rows = [Row("a collective, not recorded (fake)", fake["base"], "us")]
    for way, (_, _, goal) in _WAYS.items():
        rows.append(Row(f"{way}: added (fake)", fake[way] - fake["base"], "us", goal=goal))
        for peer, value in peers.items():
            added = fake[way] - fake["base"] if "gloo" not in peer else gloo[way] - gloo["base"]
            where = "gloo" if "gloo" in peer else "fake"
            rows.append(exact_row(f"{way}: added ({where})", added, "us", peer=peer, peer_value=value))
    return [*rows, *_step_rows()]


def _in_child(backend: str, **variables: str) -> dict[str, float]:
    """By way: microseconds of a collective, in a process with these variables."""
    command = [sys.executable, "-m", "tests.benchmarks.fault.bench_recorder", backend]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (line.rsplit(None, 1) for line in done.stdout.splitlines())
    return {way: float(value) for way, value in lines}


def _measure(backend: str) -> None:
    """Print what every way costs in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if backend == "fake":
            start_fake_group()
        else:
            dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        times: dict[str, list[float]] = {}
        for number in range(_ROUNDS + 1):
            for way, block in _turn(backend).items():
                times.setdefault(way, []).extend(block if number else ())  # the first round makes everything warm
        for way, found in times.items():
            print(way, sorted(found)[len(found) // 20])
        dist.destroy_process_group()


def _turn(backend: str) -> dict[str, list[float]]:
    tensor = torch.ones(1)

    def call() -> None:
        dist.all_reduce(tensor)

    def in_background() -> None:
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None
        work.wait()

    def with_callback() -> None:
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None
        work.get_future().add_done_callback(lambda _: time.monotonic_ns())
        work.wait()

    clock, blocks = (time.perf_counter_ns, _BLOCKS) if backend == "fake" else (time.thread_time_ns, _BLOCKS // 3)
    found = {"base": times_us(call, blocks, clock)}
    for way, (wanted, stamps_ends, _) in _WAYS.items():
        with _recorded(wanted, stamps_ends=stamps_ends):
            found[way] = times_us(call, blocks, clock)
    if backend == "fake":
        found |= {"base, in background": times_us(in_background, blocks), "callback": times_us(with_callback, blocks)}
    return found


@contextmanager
def _recorded(wanted: Wanted, *, stamps_ends: bool = True, rank: int = 0, world_size: int = 1) -> Iterator[None]:
    path = FOLDER / f"evermesh-bench-{uuid.uuid4().hex}.ring"
    recorder = Recorder(RingSpec(path, rank, world_size, 0, "node-0", "bench"), wanted=wanted, stamps_ends=stamps_ends)
    try:
        yield
    finally:
        recorder.stop()
        path.unlink()


def _step_rows() -> list[Row]:
    rows = []
    for wanted in ("native", "python"):
        (answer, _) = run_ranks(2, _steps, wanted, timeout_s=900.0)
        pairs, is_undisturbed = answer
        slower, half = _mean_and_half_interval([100 * (on / off - 1) for on, off in pairs])
        step_ms = 1000 * statistics.median(off for _, off in pairs) / _STEPS
        how = "real-time priority" if is_undisturbed else "ordinary priority"
        what = f"toy step of {step_ms:.1f} ms on 2 ranks, {wanted}, {how}: longer by"
        rows.append(Row(what, slower, "%", spread=2 * half, goal=0.5))
    return rows


def _mean_and_half_interval(values: list[float]) -> tuple[float, float]:
    """The mean of what lies between the quartiles, and half of its 95 % interval, by 1,000 samples with replacement.

    A burst of somebody else's work hits one half of a pair, and is no cost of ours.
    """
    draw = random.Random(0)

    def middle(found: list[float]) -> float:
        quarter = len(found) // 4
        return statistics.fmean(sorted(found)[quarter : len(found) - quarter])

    means = sorted(middle(draw.choices(values, k=len(values))) for _ in range(1000))
    return middle(values), (means[975] - means[25]) / 2


def _steps(rank: int, world_size: int, wanted: Wanted) -> tuple[list[tuple[float, float]], bool]:
    """Seconds of some steps with and without recording, in pairs, on this rank; and whether it had real-time priority."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    is_undisturbed = _go_first()
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randn(128, 256)

    def step() -> None:
        model(tokens).square().mean().backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()

    def seconds() -> float:
        for _ in range(_WARM):  # a recorder has just begun, or ended
            step()
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(_STEPS):
            step()
        return time.perf_counter() - begin

    def recorded() -> float:
        with _recorded(wanted, rank=rank, world_size=world_size):
            return seconds()

    seconds(), recorded()
    pairs = []
    for number in range(_PAIRS):
        in_order: list[Callable[[], float]] = [recorded, seconds] if number % 2 else [seconds, recorded]
        found = [measure() for measure in in_order]
        pairs.append((found[0], found[1]) if number % 2 else (found[1], found[0]))
    return pairs, is_undisturbed


def _go_first() -> bool:
    """Real-time priority for the threads of this process, the highest for those of gloo, which work while others wait."""
    own = os.getpid()
    try:
        for thread in map(int, os.listdir("/proc/self/task")):
            os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(10 if thread == own else 20))
    except OSError:
        return False
    return True


if __name__ == "__main__":
    _measure(sys.argv[1])
