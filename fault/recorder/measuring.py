"""What a tap adds to a collective: the call path alone, on torch's ``fake`` backend, which communicates nothing."""

import gc
import time
from collections.abc import Callable

_CALLS = 100
"""Timed together: one clock for them costs nothing."""


def cost_us(call: Callable[[], object], blocks: int = 200) -> float:
    """Microseconds of one ``call``: the 5th percentile over blocks of 100, which others on the machine hardly move."""
    return sorted(times_us(call, blocks))[blocks // 20]


def times_us(call: Callable[[], object], blocks: int, clock: Callable[[], int] = time.perf_counter_ns) -> list[float]:
    """Microseconds of one ``call`` by ``clock``, a mean per block of 100."""
    times = []
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(blocks):
            begin = clock()
            for _ in range(_CALLS):
                call()
            times.append((clock() - begin) / _CALLS / 1000)
    finally:
        if was_enabled:
            gc.enable()
    return times


def start_fake_group() -> None:
    """Make the default group of this process one of two ranks on the ``fake`` backend."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
