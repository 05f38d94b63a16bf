"""Records as JSON lines, and ``evermesh diagnose`` that reads them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from evermesh.fault.errors import RecordsUnreadable
from evermesh.fault.recorder.json_lines import read_json_lines, write_json_lines
from evermesh.fault.recorder.trace import RankTrace
from evermesh.fault.synthetic import JobShape, generate
from evermesh.fault.synthetic.faults import Hang


def _plain(traces: "list[RankTrace] | tuple[RankTrace, ...]") -> list[object]:
    """What two lists of traces have to agree in: groups and sites by what they stand for."""
    found: list[object] = []
    for trace in traces:
        groups = [(trace.groups[int(local)].name, trace.groups[int(local)].ranks) for local in trace.records["group"]]
        sites = [trace.sites[int(site)] for site in trace.records["site"]]
        numbers = trace.records[[name for name in trace.records.dtype.names or () if name not in ("group", "site")]]
        fixed = (trace.rank, trace.node, trace.pid, trace.step, trace.phase, trace.read_ns, trace.wall_offset_ns)
        found.append((fixed, groups, sites, numbers.tolist()))
    return found


def test_what_is_written_is_read() -> None:
    traces = generate(JobShape(dp=2, tp=2, pp=2), [Hang(3, 6)], read_at=0.5).traces
    assert _plain(read_json_lines(write_json_lines(traces), "memory")) == _plain(traces)


def test_what_may_be_left_out() -> None:
    lines = [
        '{"type":"group","id":7,"name":"world","ranks":[0,1]}',
        '{"type":"rank","rank":0,"node":"a","step":3,"read_ns":9000,"groups":[7]}',
        '{"type":"record","entered_ns":5,"ended_ns":8,"num_bytes":4,"group":7,"number":0,"operation":"barrier","step":3}',
        "",
        '{"type":"record","entered_ns":9,"ended_ns":null,"num_bytes":4,"group":7,"number":1,"operation":"barrier","step":3}',
    ]
    [trace] = read_json_lines(lines, "memory")
    assert trace.records["sequence"].tolist() == [1, 2]
    assert trace.records["flags"].tolist() == [3, 3]
    assert trace.records["peer"].tolist() == [-1, -1]
    assert trace.phase == "train"
    assert trace.groups[0].ranks == (0, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"operation": "all_scatter"},
        {"group": 9},
        {"entered_ns": "soon"},
        {"num_bytes": -1},
        {"flags": ["fast"]},
        {"number": None},
        {"type": "recording"},
    ],
)
def test_a_wrong_line_is_named(change: dict[str, object]) -> None:
    lines = list(write_json_lines(generate(JobShape(dp=2), [], read_at=0.3).traces))
    lines[3] = json.dumps({**json.loads(lines[3]), **change})
    with pytest.raises(RecordsUnreadable, match="some file"):
        read_json_lines(lines, "some file")


def test_random_lines_do_no_harm() -> None:
    random = np.random.default_rng(0)
    lines = list(write_json_lines(generate(JobShape(dp=2), [], read_at=0.3).traces))
    for _ in range(300):
        changed = bytearray("".join(lines).encode())
        for at in random.integers(0, len(changed), 3).tolist():
            changed[at] = int(random.integers(32, 127))
        try:
            read_json_lines(bytes(changed).splitlines(), "some file")
        except RecordsUnreadable:
            continue


def _write(path: Path, traces: "tuple[RankTrace, ...]") -> Path:
    path.write_text("".join(write_json_lines(traces)))
    return path


def test_the_command_says_what_it_found(tmp_path: Path) -> None:
    from evermesh.launcher.commands.app import app

    hung = _write(tmp_path / "hung.jsonl", generate(JobShape(dp=4), [Hang(3, 6)]).traces)
    well = _write(tmp_path / "well.jsonl", generate(JobShape(dp=4)).traces)
    found = CliRunner().invoke(app, ["diagnose", str(hung)])
    assert found.exit_code == 1
    assert "rank 3 (node node0) never entered all_reduce #11 of group world in step 6" in found.stdout
    found = CliRunner().invoke(app, ["diagnose", "--json", str(hung)])
    assert found.exit_code == 1
    assert json.loads(found.stdout)["findings"][0]["rank"] == 3
    found = CliRunner().invoke(app, ["diagnose", str(well)])
    assert (found.exit_code, "nothing found" in found.stdout) == (0, True)


def test_the_command_needs_no_torch_and_ends_with_2_for_what_it_cannot_read(tmp_path: Path) -> None:
    well = _write(tmp_path / "well.jsonl", generate(JobShape(dp=2)).traces)
    program = "import sys; from evermesh.launcher.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, "diagnose", str(well)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    done = subprocess.run(
        [sys.executable, "-c", program, "diagnose", str(tmp_path / "none")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no such file" in done.stderr
