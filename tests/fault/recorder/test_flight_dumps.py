"""Dumps of torch's own flight recorder: real ones of gloo, and ones of NCCL as its format is described."""

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from evermesh.fault.detectors import diagnose, kinds
from evermesh.fault.errors import RecordsUnreadable
from evermesh.fault.recorder.files import read_files
from evermesh.fault.recorder.flight_dumps import rank_of_name
from evermesh.fault.synthetic import JobShape, generate
from evermesh.fault.synthetic.faults import CommunicationHang, Fault, Hang, Mismatch
from tests.cluster import run_ranks
from tests.fault.recorder.nccl_dumps import nccl_dump

_HUNG = 1
_OPEN_S = 0.9
"""Longer than the shortest hang that is told."""


def _hang(rank: int, size: int, folder: str) -> None:
    import torch._C._distributed_c10d as c10d

    pickled, as_json = getattr(c10d, "_dump_fr_trace"), getattr(c10d, "_dump_fr_trace_json")  # noqa: B009

    groups = [dist.new_group([first, first + 1]) for first in range(0, size, 2)]
    sums = torch.ones(4)
    for _ in range(3):
        dist.all_reduce(sums)
        dist.all_reduce(sums, group=groups[rank // 2])
        dist.all_gather([torch.empty(4) for _ in range(size)], sums)
    work = None
    if rank == _HUNG:
        _wait_for(lambda: len(list(Path(folder).glob("*.done"))) == size - 1)
    else:
        work = dist.all_reduce(sums, async_op=True)
        time.sleep(_OPEN_S)
    Path(folder, f"trace_rank_{rank}").write_bytes(pickled())
    Path(folder, f"trace_{rank}.json").write_bytes(as_json())
    Path(folder, f"{rank}.done").touch()
    if work is None:
        work = dist.all_reduce(sums, async_op=True)
    assert work is not None
    work.wait()


def _wait_for(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline_s = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.parametrize("size", [2, 4])
def test_the_hung_rank_is_named_from_dumps_of_gloo(size: int, tmp_path: Path) -> None:
    run_ranks(size, _hang, str(tmp_path))
    for pattern in ("trace_rank_*", "trace_*.json"):
        files = sorted(tmp_path.glob(pattern))
        assert len(files) == size
        [finding] = diagnose(read_files(files)).findings
        assert (finding.kind, finding.rank) == (kinds.HANG, _HUNG)
        assert "rank 1 never entered all_reduce #6 of group default_pg" in finding.text
        [finding] = diagnose(read_files([file for file in files if rank_of_name(file) != _HUNG])).findings
        assert finding.rank == _HUNG
        assert "no records of rank 1" in finding.text


@pytest.mark.parametrize("is_json", [False, True])
@pytest.mark.parametrize(
    ("fault", "kind", "rank"),
    [
        (Hang(5, 6, "dp"), kinds.HANG, 5),
        (CommunicationHang(2, 6, "tp"), kinds.COMMUNICATION_HANG, None),
        (Mismatch(3, 6, dtype="float16"), kinds.DTYPE_MISMATCH, 3),
        (None, None, None),
    ],
)
def test_dumps_of_nccl(fault: Fault | None, kind: str | None, rank: int | None, is_json: bool, tmp_path: Path) -> None:
    job = generate(JobShape(dp=4, tp=2, pp=2), [fault] if fault is not None else [])
    files = []
    for trace in job.traces:
        files.append(tmp_path / (f"dump_{trace.rank}.json" if is_json else f"nccl_trace_rank_{trace.rank}"))
        dump = nccl_dump(trace)
        files[-1].write_bytes(json.dumps(dump).encode() if is_json else pickle.dumps(dump))
        read_s = (trace.read_ns + trace.wall_offset_ns) / 1e9
        os.utime(files[-1], (read_s, read_s))
    findings = diagnose(read_files(files)).findings
    assert [(one.kind, one.rank) for one in findings] == ([(kind, rank)] if kind is not None else [])


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harm",)


def test_a_pickle_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "dump_0"
    file.write_bytes(pickle.dumps({"entries": [_Harmful()]}))
    with pytest.raises(RecordsUnreadable, match="mkdir"):
        read_files([file])
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04}q", b'{"entries": 3}', b'{"entries": [{}]}', b"hello", b'{"type":"record"}\n']
)
def test_files_of_no_known_form_are_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "dump_0"
    file.write_bytes(content)
    with pytest.raises(RecordsUnreadable, match=r"dump_0|entry"):
        read_files([file])


def test_a_dump_needs_a_rank_in_its_name(tmp_path: Path) -> None:
    file = tmp_path / "dump.json"
    file.write_text('{"entries": [], "pg_config": {}}')
    with pytest.raises(RecordsUnreadable, match="rank"):
        read_files([file])
