"""Jobs are found, watched and stopped by commands given anywhere, whoever started them and whatever became of him.

Tests with jobs of their own come first: from then on a job trains behind all others.
"""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest

from evermesh import checkpoint
from evermesh.launcher import Run
from evermesh.launcher.contact import read_contact, read_token
from tests.launcher.jobs import Job, clean_losses, end_for_certain, launched
from tests.launcher.test_cli import EVERMESH, evermesh
from tests.launcher.test_metrics import by_name
from tests.processes import still_alive, who_shows

ENDLESS = ("train.steps=100000", "nodes=2", "train.checkpoint.every=50")
STEPS = 80


@pytest.fixture(scope="module", autouse=True)
def _own_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Jobs of other tests, and of whoever works on this machine, are not seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


def test_a_stopped_job_has_a_checkpoint_of_its_last_step_and_can_be_resumed_at_once(job_file: Path) -> None:
    with launched(job_file, *ENDLESS, name="graceful") as job:
        job.wait_training()
        done = evermesh("stop", "graceful", "--grace", "20")
        assert done.returncode == 0, done.stderr
        assert f"; go on with: evermesh resume {job.run.directory}" in done.stdout
        step = checkpoint.checkpoints(job.run.checkpoints)[-1].step
        assert f"graceful: stopped after step {step}" in done.stdout
        assert len(job.losses) == step
        assert job.end()[0] == 143
        resumed = evermesh("resume", job.run.directory, "--set", f"train.steps={step + 2}")
        assert resumed.returncode == 0, resumed.stderr


def test_stop_now_ends_workers_that_hear_nothing(job_file: Path) -> None:
    with launched(job_file, *ENDLESS, name="stuck") as job:
        for rank in job.wait_training().ranks:
            psutil.Process(rank.pid).suspend()
        members = job.processes()
        done = evermesh("stop", job.run.directory, "--now")
        assert done.returncode == 0, done.stderr
        assert still_alive(members, 3) == []
        code, _, stderr = job.end()
        assert code == 143
        assert "at once, without a save" in stderr


def test_a_job_whose_terminal_is_lost_goes_on_and_is_stopped_from_elsewhere(job_file: Path, tmp_path: Path) -> None:
    with launched(job_file, *ENDLESS, name="lonely") as job:
        job.wait_training()
        os.killpg(job.process.pid, signal.SIGHUP)  # as sshd does when the connection is gone
        code, stdout, _ = job.end()
        assert code == 128 + signal.SIGHUP
        assert "the job goes on by itself; it is found again with: evermesh status" in stdout
        steps = len(job.losses)
        job.wait(lambda: len(job.losses) > steps + 5)
        told = json.loads(
            subprocess.run(
                [*EVERMESH, "status", "lonely", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True
            ).stdout
        )
        assert told["directory"] == str(job.run.directory)
        assert evermesh("stop", "lonely").returncode == 0
        assert job.run.status() == "stopped"


NOTEBOOK = """
import sys
from rich.console import Console
from evermesh.launcher import load_job
from evermesh.launcher.operations import launch_job
launch_job(load_job(sys.argv[1], ["train.steps=100000", "name=cell"]), Console())
"""


@contextmanager
def notebook(job_file: Path) -> Iterator[Job]:
    """``launch_job`` called from Python, as a cell of a notebook does."""
    with subprocess.Popen(
        [sys.executable, "-c", NOTEBOOK, str(job_file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        job = Job(process, Run(job_file.parent / "runs" / "cell"))
        try:
            job.wait(lambda: (job.run.directory / "token").is_file() or process.poll() is not None)
            assert process.poll() is None, process.communicate()
            yield job
        finally:
            end_for_certain(job)


def test_a_job_started_from_python_is_found_and_stopped(job_file: Path) -> None:
    with notebook(job_file) as job:
        job.wait_training()
        assert json.loads(evermesh("status", "cell", "--json").stdout)["state"] == "training"
        done = evermesh("stop", "cell")
        assert done.returncode == 0, done.stderr
        code, stdout, stderr = job.end()
        assert code == 0, stderr
        assert "stopped after step" in stdout


@pytest.mark.soak
def test_two_jobs_on_one_machine_do_not_disturb_each_other(job_file: Path) -> None:
    steps, saves = f"train.steps={STEPS}", "train.checkpoint.every=10"
    alone = clean_losses(job_file, STEPS)
    with (
        launched(job_file, steps, saves, name="one") as one,
        launched(job_file, steps, saves, name="other") as other,
    ):
        one.wait_training()
        other.wait_training()
        one.wait_checkpoint()
        one.kill_rank(1)
        for job in (one, other):
            code, _, stderr = job.end()
            assert code == 0, stderr
        assert (one.run.state().attempt, other.run.state().attempt) == (2, 1)
        assert one.losses == alone
        assert other.losses == alone


@pytest.fixture(scope="module")
def job(job_file_of_module: Path) -> Iterator[Job]:
    """A job that trains until the end of this module's tests."""
    with launched(job_file_of_module, *ENDLESS, name="watched") as job:
        job.wait_training()
        yield job


def test_status_finds_the_only_job_from_anywhere_without_a_name(job: Job, tmp_path: Path) -> None:
    shown = subprocess.run(
        [*EVERMESH, "status"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    assert shown.startswith("watched  training (the first step is finished)\nstep ")
    for part in ("node-0", "node-1", "ready", "of 100000 | loss ", f"directory {job.run.directory}"):
        assert part in shown
    assert read_token(job.run.directory) not in shown


@pytest.mark.parametrize("name", ["watched", "directory", "process"])
def test_status_as_json_is_that_of_the_controller(job: Job, name: str) -> None:
    names = {"watched": "watched", "directory": str(job.run.directory), "process": str(job.run.state().pid)}
    told = json.loads(evermesh("status", names[name], "--json").stdout)
    assert (told["name"], told["state"], told["generation"], told["workers"]) == ("watched", "training", 1, 2)
    assert [rank["state"] for rank in told["ranks"]] == ["training"] * 2
    assert all(psutil.pid_exists(rank["pid"]) for rank in told["ranks"])


def test_status_tells_what_a_restart_would_lose(job: Job) -> None:
    job.wait(lambda: (found := job.client.status().snapshot) is not None and found.protection == "protected")
    told = json.loads(evermesh("status", "watched", "--json").stdout)
    found = told["snapshot"]
    assert found["is_on"]
    assert found["step"] <= told["step"]
    assert found["lost_steps"] == found["lost_steps_of_node"], "the other node holds a copy"
    assert found["committed"] >= 1
    assert found["protection"] == "protected"
    assert all(node["snapshot_bytes"] > 0 for node in told["nodes"])
    for command in (("status", "watched"), ("top", "watched", "--once")):
        shown = " ".join(evermesh(*command).stdout.split())
        assert " in memory, " in shown
        assert " MiB per node, protected" in shown
        assert "a restart loses " in shown


def test_prometheus_is_told_of_the_job_and_of_its_nodes_if_it_shows_the_token(job: Job) -> None:
    told = by_name(evermesh("metrics", "watched").stdout)
    now = json.loads(evermesh("status", "watched", "--json").stdout)
    assert told["evermesh_step"][()] <= now["step"]
    assert told["evermesh_trained_steps_total"][()] >= told["evermesh_step"][()]
    assert told["evermesh_job_state"][("training",)] == 1
    assert set(told["evermesh_node_snapshot_bytes"]) == {(node["host"], node["node"]) for node in now["nodes"]}
    assert set(told["evermesh_rank_compute_seconds"]) == {("node-0", "0"), ("node-1", "1")}
    assert told["evermesh_events_total"][("started",)] >= 1
    headers = {"Authorization": f"Bearer {read_token(job.run.directory)}"}
    targets = httpx2.get(f"{read_contact(job.run.directory)}/api/metrics/targets", headers=headers).json()
    assert targets == json.loads((job.run.directory / "prometheus.json").read_text())
    controller, *agents = targets
    assert controller["targets"] == [str(read_contact(job.run.directory)).removeprefix("http://")]
    assert controller["labels"] == {"__metrics_path__": "/api/metrics", "run": "watched", "role": "controller"}
    assert [target["labels"]["node"] for target in agents] == ["node-0", "node-1"]
    for number, target in enumerate(agents):
        (address,) = target["targets"]
        assert address.startswith("127.0.0.1:")
        assert httpx2.get(f"http://{address}/metrics").status_code == 401
        of_node = by_name(httpx2.get(f"http://{address}/metrics", headers=headers).text)
        assert of_node["evermesh_agent_rank_step"][(f"node-{number}", str(number))] > 0
        assert of_node["evermesh_machine_memory_available_bytes"][()] > 0


def test_nodes_lists_leases_and_ranks(job: Job) -> None:
    told = json.loads(evermesh("nodes", "watched", "--json").stdout)
    assert [(node["node"], node["state"], node["ranks"]) for node in told] == [
        ("node-0", "ready", [0]),
        ("node-1", "ready", [1]),
    ]
    assert all(0 < node["lease_left_s"] <= 2 for node in told)
    assert "node-1" in evermesh("nodes").stdout


def test_top_once_shows_curves_ranks_and_nodes(job: Job) -> None:
    shown = evermesh("top", "--once").stdout
    for part in ("watched  training", "loss ", "tokens/s", "node-0", "compute"):
        assert part in shown


def test_logs_are_printed_by_rank_and_by_number_of_lines(job: Job) -> None:
    every = evermesh("logs", "watched").stdout
    assert "rank-0 | " in every
    assert "rank-1 | " in every
    one = evermesh("logs", "watched", "--rank", "1").stdout
    assert "rank 1: generation 1" in one
    assert "|" not in one
    assert evermesh("logs", "watched", "-n", "0").stdout == ""
    controls = evermesh("logs", "watched", "--control")
    assert controls.returncode == 0, controls.stderr
    missing = evermesh("logs", "watched", "--rank", "7")
    assert missing.returncode == 2
    assert "There are: rank-0, rank-1." in missing.stderr


def test_logs_shows_what_living_ranks_are_doing(job: Job) -> None:
    shown = evermesh("logs", "watched", "--stacks", "-n", "200").stdout
    assert "rank 0: asked for" in shown
    assert "trainer.py" in shown
    assert job.client.status().generation == 1


def test_logs_follows_what_comes_until_ctrl_c(job: Job) -> None:
    command = [*EVERMESH, "logs", "watched", "-f", "-n", "0", "--rank", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as following:
        assert following.stdout
        log, seen = job.run.logs / "rank-0.log", ""
        time.sleep(0.5)
        for number in range(20):  # until it has begun to follow
            with log.open("a") as output:
                output.write(f"a new line, {number}\n")
            time.sleep(0.1)
        seen = following.stdout.readline()
        following.send_signal(signal.SIGINT)
        assert following.wait(10) == 130
        assert following.stderr
        assert following.stderr.read() == ""
    assert seen.startswith("a new line, ")


def test_a_reader_that_has_seen_enough_is_no_error(job: Job) -> None:
    command = f"{' '.join(map(repr, EVERMESH))} logs watched -n 100 --stacks | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_the_page_of_the_dashboard_is_for_its_owner_and_the_token_is_not_printed(job: Job) -> None:
    done = evermesh("dashboard", "watched")
    assert done.returncode == 0, done.stderr
    page = job.run.directory / "dashboard.html"
    assert done.stdout == f"open file://{page} in a browser on this machine\n"
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    assert read_token(job.run.directory) in page.read_text()


def test_the_dashboard_is_opened_in_the_browser_that_is_set(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$@" > {told}\n')
    browser.chmod(0o700)
    monkeypatch.setenv("BROWSER", str(browser))
    done = evermesh("dashboard", "watched", "--open")
    assert done.returncode == 0, done.stderr
    assert told.read_text() == f"file://{job.run.directory / 'dashboard.html'}\n"


def test_the_token_is_in_no_log_no_journal_and_in_nothing_that_processes_show(job: Job) -> None:
    """Files of the run, and arguments and environment of every process of the job: controller, agents, keepers, workers."""
    token = read_token(job.run.directory).encode()
    secret = {"token", "dashboard.html"}
    for path in job.run.directory.rglob("*"):
        if path.is_file() and path.name not in secret:
            assert token not in path.read_bytes(), path
    assert len(who_shows(str(job.run.directory).encode())) >= 2  # the controller, an agent
    assert who_shows(token) == []
    for path in (job.run.directory / name for name in secret):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_every_process_listens_on_this_machine_only(job: Job) -> None:
    listening = [
        connection.laddr.ip
        for process in job.processes()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 4  # the API, the store, and gloo in every rank
    assert set(listening) == {"127.0.0.1"}


def test_two_living_jobs_are_listed_and_a_name_is_asked_for(job: Job, job_file: Path, tmp_path: Path) -> None:
    with launched(job_file, *ENDLESS[:1], name="second") as second:
        second.wait_training()
        listed = evermesh("status").stdout
        assert "watched" in listed
        assert "second" in listed
        rows = json.loads(evermesh("status", "--json").stdout)
        assert [row["name"] for row in rows] == ["watched", "second"]
        refused = evermesh("stop")
        assert refused.returncode == 2
        assert "2 jobs could be meant. Give the directory of one:" in refused.stderr
        second.process.kill()  # kill -9: nobody shows it any more, and it goes on
        steps = len(second.losses)
        second.wait(lambda: len(second.losses) > steps + 5)
        members = second.processes()
        asked = evermesh("stop", "second", "--no-wait")
        assert asked.returncode == 0, asked.stderr
        assert "asked second to stop" in asked.stdout
        second.wait(lambda: second.run.status() == "stopped", 20)
        assert still_alive(members, 5) == []
        again = evermesh("stop", second.run.directory)
        assert again.returncode == 2
        assert "run second does not live: it is stopped." in again.stderr
        shown = evermesh("status", second.run.directory).stdout
        assert "stopped at " in shown
        assert "go on with: evermesh resume" in shown
    assert job.client.status().generation == 1
    assert all(node.state == "ready" for node in job.client.status().nodes)


def test_jobs_that_are_not_there_are_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVERMESH_CLUSTER", str(tmp_path / "cluster"))
    nodes = evermesh("nodes")
    assert nodes.stdout.strip() == f"nothing is known of any node in {tmp_path / 'cluster'}", (
        "no job is needed for that"
    )
    for command in (["stop"], ["status"], ["top"], ["nodes", "nonsense"], ["dashboard"], ["logs"]):
        done = evermesh(*command)
        assert done.returncode == 2, done
        expected = (
            "there is no run nonsense in the folder runs"
            if "nonsense" in command
            else "there is no run in the folder runs"
        )
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
    done = evermesh("logs", "nonsense")
    assert done.returncode == 2
    assert "there is no run nonsense in the folder runs" in done.stderr
