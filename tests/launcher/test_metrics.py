"""Numbers for Prometheus, read back by its own parser."""

import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from evermesh.fault.events import EventLog
from evermesh.launcher import Run
from evermesh.launcher.controller.status import JobStatus, NodeStatus, RankStatus, SnapshotStatus
from evermesh.launcher.metrics.job import job_families
from evermesh.launcher.metrics.node import NodeCollector
from evermesh.launcher.metrics.serving import MetricsServer, rendered
from evermesh.launcher.metrics.totals import Totals
from evermesh.parallelism.ledger import Traffic
from evermesh.runtime.telemetry import StepReport
from tests.launcher.reports import step_report
from tests.launcher.test_cli import EVERMESH, evermesh

Numbers = dict[str, dict[tuple[str, ...], float]]


def by_name(text: str) -> Numbers:
    """By name of a sample: its values by those of its labels, which are sorted by name."""
    found: Numbers = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(value for _, value in sorted(sample.labels.items()))] = sample.value
    return found


def _report(step: int, *, committed: bool = True) -> StepReport:
    traffic = (Traffic("gradients", "all_reduce", "hdp", "node", 100, 200, 2),)
    waits = {"plan_wait_s": 0.1, "checkpoint_stop_s": 0.2}
    return step_report(step, 0.5, num_tokens=1000, committed=committed, traffic=traffic, **waits)


def _status(**changes: object) -> JobStatus:
    told = JobStatus(
        name="job",
        directory="/runs/job",
        state="training",
        reason="all ranks train",
        generation=2,
        restarts=1,
        max_restarts=3,
        workers=2,
        nodes=(
            NodeStatus(node="node-0", host="a", state="ready", lease_left_s=1.5, snapshot_bytes=7),
            NodeStatus(node="node-1", host='b"\\', state="cut off", is_spare=True),
        ),
        ranks=(
            RankStatus(rank=0, node="node-0", state="training", step=5, step_s=0.5, compute_s=0.4),
            RankStatus(rank=1, node="node-1", state="starting"),
        ),
        snapshot=SnapshotStatus(is_on=True, step=4, protection="degraded", lost_steps=1),
        started_s=1.0,
        pid=1,
    )
    return told.model_copy(update=changes)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


class _Of:
    def __init__(self, *told: object) -> None:
        self._told = told

    def collect(self) -> Iterator[object]:
        return job_families(*self._told)  # type: ignore[arg-type]


def _numbers(status: JobStatus, report: StepReport | None, totals: Totals) -> Numbers:
    return by_name(rendered(_Of(status, report, totals)).decode())  # type: ignore[arg-type]


def test_a_job_is_told_with_the_numbers_of_its_status_and_what_is_not_known_is_left_out(run: Run) -> None:
    found = _numbers(_status(), _report(5), Totals(run))
    assert found["evermesh_step"] == {(): 5}
    assert found["evermesh_tokens_per_second"] == {(): 2000}
    assert found["evermesh_plan_makespan_ratio"][()] == pytest.approx(1.1)
    assert {state for (state,), value in found["evermesh_job_state"].items() if value} == {"training"}
    assert found["evermesh_node_lease_left_seconds"] == {("a", "node-0"): 1.5}
    assert found["evermesh_node_is_spare"] == {("a", "node-0"): 0, ('b"\\', "node-1"): 1}
    assert found["evermesh_node_state"][('b"\\', "node-1", "cut off")] == 1
    assert found["evermesh_rank_step"] == {("node-0", "0"): 5}
    assert found["evermesh_snapshot_protection"][("degraded",)] == 1
    assert "evermesh_held_out_loss" not in found
    assert "evermesh_steps_wanted" not in found
    before = _numbers(_status(snapshot=None, nodes=(), ranks=()), None, Totals(run))
    assert not {name for name in before if re.match("evermesh_(step$|loss|node|rank|snapshot)", name)}


def test_names_are_as_prometheus_wants_them(run: Run) -> None:
    job = set(_numbers(_status(), _report(5), Totals(run)))
    machine = set(by_name(rendered(NodeCollector((run.directory,))).decode()))
    for name in job | machine:
        assert re.fullmatch("evermesh_[a-z0-9_]+", name)
        assert not re.search("_(ms|kb|mib|minutes|percent)(_|$)", name)


def test_totals_are_those_of_all_files_however_often_they_are_read_on(run: Run) -> None:
    totals, log = Totals(run), EventLog(run.events)
    totals.read_on()
    assert totals.steps == 0
    for step in range(1, 8):
        with run.telemetry.open("a") as file:
            file.write(_report(step, committed=step != 3).to_json() + "\n")
            if step == 5:
                totals.read_on()
                file.write('{"step": 6, "los')  # what a killed rank 0 leaves; it is cut off before others write on
                file.flush()
                totals.read_on()
                file.truncate(file.tell() - len('{"step": 6, "los'))
        log.write("saved" if step % 2 else "evaluated", "", step=step)
        totals.read_on()
    whole = Totals(run)
    whole.read_on()
    for found in (totals, whole):
        assert (found.steps, found.skipped_steps, found.tokens) == (7, 1, 7000)
        assert found.events == {"saved": 4, "evaluated": 3}
        assert found.bytes == {"node": 1400}
        assert found.seconds["plan wait"] == pytest.approx(0.7)
        assert sum(found.seconds.values()) == pytest.approx(3.5)
    log.close()


def test_a_server_with_a_token_answers_nobody_else_and_only_what_it_has(run: Run) -> None:
    server = MetricsServer(NodeCollector((run.directory,)), token="secret")
    try:
        right = {"Authorization": "Bearer secret"}
        for wrong in (
            {},
            {"Authorization": "secret"},
            {"Authorization": "Bearer secret2"},
        ):
            assert httpx2.get(server.url, headers=wrong).status_code == 401
        assert httpx2.get(server.url, headers=right).status_code == 200
        assert httpx2.get(f"http://{server.at}/etc/passwd", headers=right).status_code == 404
        assert httpx2.post(server.url, headers=right).status_code == 405
        with socket.create_connection(("127.0.0.1", server.port)) as silent, httpx2.Client(headers=right) as others:
            assert silent is not None
            assert others.get(server.url).status_code == 200
    finally:
        server.close()


def test_a_machine_without_a_job_is_served_until_ctrl_c(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = evermesh("metrics", "--serve", address)
        assert refused.returncode == 2
        assert f"nothing can be served at {address}" in refused.stderr
    assert "is no address; write HOST:PORT" in evermesh("metrics", "--serve", "9464").stderr
    (tmp_path / "empty").write_text("\n")
    empty = evermesh("metrics", "--serve", "127.0.0.1:0", "--token-file", tmp_path / "empty")
    assert (empty.returncode, "is empty" in empty.stderr) == (2, True)
    with subprocess.Popen([*EVERMESH, "metrics", "--serve", address], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"serving http://{address}/metrics\n"
        time.sleep(0.05)
        found = by_name(httpx2.get(f"http://{address}/metrics").text)
        assert found["evermesh_machine_processors"][()] > 0
        assert found["evermesh_machine_file_system_free_bytes"][("/dev/shm",)] >= 0
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
