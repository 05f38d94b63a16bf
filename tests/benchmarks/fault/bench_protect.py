"""Snapshots of four members protected and rebuilt over loopback, next to a copy on another rank by gloo's all_gather.

Four processes with ``SIZE_MB`` (192) MiB each, code 3+1, and eight of them with ``WIDE_SIZE_MB``, code 6+2. The copy is
what replication takes: all_gather in pairs, into memory that was touched before. Where members hold three quarters of their
data alike, that is measured beside the same with all coded. Every pattern of losses is rebuilt and
compared, byte by byte of data and by digest of parity. Seconds are those of the slowest member; beside them is the
processor time of all members over the number of cores, which other jobs on the machine lengthen less.
"""

import itertools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from evermesh.fault.snapshot.coding import Code
from evermesh.fault.snapshot.stripes import PIECE, Payload, StripeTransfer, digests_of, listen, parity_bytes
from tests.benchmarks.harness import Row, exact_row, paired_row
from tests.cluster import run_ranks
from tests.fault.snapshot.members import Node, membership, random_node

_MIB = 1 << 20
_BYTES = int(os.environ.get("SIZE_MB", "192")) * _MIB
_WIDE_BYTES = int(os.environ.get("WIDE_SIZE_MB", str(_BYTES // _MIB))) * _MIB
_ROUNDS = int(os.environ.get("ROUNDS", "7"))
_PER = 192 * _MIB
_PROTECT_GOAL_S, _REBUILD_GOAL_S = 0.4, 0.8


def run() -> list[Row]:
    """Protect beside replication, and rebuild."""
    [found, *_] = run_ranks(4, _members, Code(3, 1), _BYTES, True, timeout_s=600)
    size = f"4 x {_BYTES // _MIB} MiB, 3+1"
    rows = [
        _beside_copies(f"protect {size}", found, ""),
        _beside_copies(f"protect {size}, processor time", found, ", processor"),
        exact_row("memory of parity, 3+1", found["parity"][0], "x data", goal=1 / 3, peer="copy", peer_value=1.0),
        *_rebuilt("rebuild 1 of 4, 3+1", found, _BYTES),
    ]
    [alike, *_] = run_ranks(4, _alike, Code(3, 1), _BYTES, timeout_s=600)
    rows += [
        paired_row(
            f"protect {size}, 3/4 of it alike{kind}",
            alike[f"alike{key}"],
            "s",
            peer="all coded",
            peer_values=alike[f"all coded{key}"],
        )
        for kind, key in (("", ""), (", processor time", ", processor"))
    ]
    rows += [
        exact_row("memory of parity, 3/4 alike", alike["parity"][0], "x data", peer="all coded", peer_value=1 / 3),
        *_rebuilt("rebuild 1 of 4, 3/4 alike", alike, _BYTES),
    ]
    [wide, *_] = run_ranks(8, _members, Code(6, 2), _WIDE_BYTES, False, timeout_s=900)
    size = f"8 x {_WIDE_BYTES // _MIB} MiB, 6+2"
    rows.append(Row(f"protect {size}", statistics.median(wide["protect"]), "s"))
    rows.append(Row(f"protect {size}, processor time", statistics.median(wide["protect, processor"]), "s"))
    return [*rows, *_rebuilt("rebuild 2 of 8, 6+2", wide, 2 * _WIDE_BYTES)]


def _beside_copies(what: str, found: dict[str, list[float]], kind: str) -> Row:
    ours, copies = found[f"protect{kind}"], found[f"copy{kind}"]
    row = paired_row(what, ours, "s", peer="gloo all_gather", peer_values=copies)
    return replace(row, goal=_PROTECT_GOAL_S)


def _rebuilt(what: str, found: dict[str, list[float]], lost_bytes: int) -> Iterator[Row]:
    for kind, name in (("", ""), (", processor", ", processor time")):
        per = [seconds * _PER / lost_bytes for seconds in found[f"rebuild{kind}"]]
        first, median, third = statistics.quantiles(per, n=4)
        text = f"{what}, all {len(per)} patterns equal, per 192 MiB lost{name}"
        yield Row(text, median, "s", third - first, goal=_REBUILD_GOAL_S)


def _members(rank: int, size: int, code: Code, num_bytes: int, with_copy: bool) -> dict[str, list[float]]:
    node = random_node(0, rank, num_bytes, code, num_bytes)
    found: dict[str, list[float]] = defaultdict(list)
    digests = digests_of(Payload([memoryview(node.data)]))
    copies = _pair_copies(rank, size, node) if with_copy else None
    with closing(listen("127.0.0.1")) as listener:
        transfer = StripeTransfer(membership(rank, code, listener.getsockname()[1]), listener)
    with transfer:
        for step in range(_ROUNDS + 1):

            def protect(step: int = step) -> None:
                node.record = transfer.protect(step, [memoryview(node.data)], memoryview(node.parity), digests)

            _measure(protect, found, "protect")
            if copies is not None:
                _measure(copies, found, "copy")
        for measured in found.values():
            del measured[:1]  # memory is touched for the first time
        before = bytes(node.data)
        for lost in itertools.combinations(range(size), code.parity):
            _rebuild(transfer, node, rank in lost, found)
            assert node.data == before, f"{lost}: other bytes"
    return {**found, "parity": [len(node.parity) / num_bytes]}


def _alike(rank: int, size: int, code: Code, num_bytes: int) -> dict[str, list[float]]:
    node = random_node(0, rank, num_bytes, code, num_bytes)
    chunks, shared = num_bytes // _MIB, 3 * num_bytes // 4 // _MIB
    node.data[: shared * _MIB] = random_node(1, 0, shared * _MIB, code, num_bytes).data
    pieces = np.zeros(chunks, PIECE)
    pieces["start"], pieces["num_bytes"] = np.arange(chunks) * _MIB, _MIB
    pieces["key"] = np.arange(chunks) + (np.arange(chunks) >= shared) * (rank + 1) * chunks
    found: dict[str, list[float]] = defaultdict(list)
    data, all_parity = [memoryview(node.data)], node.parity
    node.parity = bytearray(parity_bytes(code, num_bytes - shared * _MIB))
    with closing(listen("127.0.0.1")) as listener:
        transfer = StripeTransfer(membership(rank, code, listener.getsockname()[1]), listener)
    with transfer:
        for step in range(_ROUNDS + 1):

            def protect(step: int = step) -> None:
                told = [np.frombuffer(one, PIECE) for one in transfer.tell_all(step, pieces.tobytes())]
                copies = transfer.find_copies(step, data, told, [num_bytes] * size)
                node.record = transfer.protect(step, data, memoryview(node.parity), pieces=copies)

            def protect_all(step: int = step) -> None:
                transfer.protect(step, data, memoryview(all_parity))

            _measure(protect_all, found, "all coded")
            _measure(protect, found, "alike")
        for measured in found.values():
            del measured[:1]  # memory is touched for the first time
        before = bytes(node.data)
        for lost in range(size):
            _rebuild(transfer, node, rank == lost, found)
            assert node.data == before, f"{lost}: other bytes"
    return {**found, "parity": [len(node.parity) / num_bytes]}


def _rebuild(transfer: StripeTransfer, node: Node, is_lost: bool, found: dict[str, list[float]]) -> None:
    record = node.record
    assert record is not None
    if is_lost:
        node.lose()

    def rebuild() -> None:
        node.record = transfer.rebuild(
            record.step, node.record, [memoryview(node.data)], memoryview(node.parity)
        ).record

    _measure(rebuild, found, "rebuild")
    assert node.record is not None
    assert node.record.root == record.root  # data and parity were compared with its digests on arrival


def _pair_copies(rank: int, size: int, node: Node) -> Callable[[], None]:
    pairs = [dist.new_group([first, first + 1]) for first in range(0, size, 2)]
    whole = torch.frombuffer(node.data, dtype=torch.uint8)
    copies = [torch.zeros_like(whole) for _ in range(2)]
    return lambda: dist.all_gather(copies, whole, group=pairs[rank // 2])


def _measure(work: Callable[[], object], found: dict[str, list[float]], what: str) -> None:
    """Seconds of the slowest member from when all are there, and processor time of all over the number of cores."""
    dist.barrier()
    started_s, processor_s = time.perf_counter(), time.process_time()
    work()
    processor_s = time.process_time() - processor_s
    seconds, processor = torch.tensor(time.perf_counter() - started_s), torch.tensor(processor_s)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    dist.all_reduce(processor)
    found[what].append(float(seconds))
    found[f"{what}, processor"].append(float(processor) / (os.cpu_count() or 1))
