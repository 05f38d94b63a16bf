"""``python -m evermesh.fault.recorder.native.self_test LIBRARY``: whether a native tap does what it should, and its cost.

Run in a process of its own: what is wrong with a library may end it. Prints the cost as JSON.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from evermesh.fault.recorder.errors import TapUnusable
from evermesh.fault.recorder.measuring import cost_us, start_fake_group
from evermesh.fault.recorder.native.tap import NativeTap
from evermesh.fault.recorder.reader import read_ring
from evermesh.fault.recorder.record import NO_PEER, OPERATIONS, Flags
from evermesh.fault.recorder.ring import Ring, RingSpec
from evermesh.parallelism.collectives import Communicator

_END_S = 10.0


def main(library: Path) -> None:
    """Test, measure, print.

    Raises:
        TapUnusable: it is not what it should be; says where.
    """
    with tempfile.TemporaryDirectory() as folder:
        ring = Ring.make(RingSpec(Path(folder) / "0-0.ring", 0, 1, 0, "self-test", folder))
        tap = NativeTap(ring, library)
        tap.install()
        _test(ring, Path(folder))
        print(json.dumps(_measure(tap)))


def _test(ring: Ring, folder: Path) -> None:
    """Compare records with what was called: on gloo, one rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    tensor, world = torch.ones(6), Communicator(dist.group.WORLD)
    world.all_reduce(tensor, "self-test")
    world.broadcast(tensor.double(), 0, "self-test")
    world.all_gather(torch.empty(6), tensor, "self-test")
    _functional_sum(tensor)
    world.barrier("self-test")
    wanted = [
        ("all_reduce", 24, 0, NO_PEER),
        ("broadcast", 48, 1, 0),
        ("all_gather", 24, 2, NO_PEER),
        ("all_reduce", 24, 3, NO_PEER),
        ("barrier", 0, 4, NO_PEER),
    ]
    until = time.monotonic() + _END_S
    while True:
        records = read_ring(ring.path)[0].records
        found = [
            (OPERATIONS[one["operation"]], int(one["num_bytes"]), int(one["number"]), int(one["peer"]))
            for one in records
        ]
        if found == wanted and all(_has_ended(one) for one in records):
            break
        if time.monotonic() > until:
            raise TapUnusable(f"recorded {found} (ended: {[_has_ended(one) for one in records]}) instead of {wanted}")
        time.sleep(0.01)
    dist.destroy_process_group()


def _functional_sum(tensor: torch.Tensor) -> None:
    """A sum that Python's process group never hears of."""
    group = torch.distributed.group.WORLD
    assert group is not None
    operator: Callable[..., torch.Tensor] = torch.ops._c10d_functional.all_reduce
    torch.ops._c10d_functional.wait_tensor(operator(tensor, "sum", group.group_name))


def _has_ended(record: object) -> bool:
    entered, enqueued, ended, flags = (int(record[name]) for name in ("entered_ns", "enqueued_ns", "ended_ns", "flags"))  # type: ignore[index]
    return bool(flags & Flags.END_SEEN) and 0 < entered <= enqueued and entered <= ended


def _measure(tap: NativeTap) -> dict[str, float]:
    """Microseconds that a collective takes longer: with starts, and with starts and ends."""
    import torch.distributed as dist

    start_fake_group()
    tensor, pair = torch.ones(1), Communicator(dist.group.WORLD)

    def call() -> None:
        pair.all_reduce(tensor, "measured")

    with_end = cost_us(call)
    tap.stamp_ends(wanted=False)
    start = cost_us(call)
    tap.restore()
    base = cost_us(call)
    return {"base_us": base, "start_us": start - base, "start_and_end_us": with_end - base}


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except TapUnusable as error:
        sys.exit(str(error))
