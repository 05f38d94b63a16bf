"""A real Prometheus, configured by what is rendered, watches a real job from the file of targets to the last panel."""

import json
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from evermesh.deploy import render_monitoring
from evermesh.deploy.monitoring import ALERTS, ROWS
from evermesh.launcher.contact import make_token, read_contact, read_token
from evermesh.launcher.errors import ListenInvalid
from tests.launcher.jobs import launched
from tests.launcher.test_cli import evermesh

PROMETHEUS = shutil.which("prometheus")
TOKEN = "0123456789abcdef0123456789abcdef"
WAIT_S = 60.0
RARE = {"evermesh_held_out_loss", "evermesh_finding_confidence", "evermesh_time_left_seconds"}
"""Numbers that a job need not have: without evaluation, findings, or an estimate."""


class Prometheus:
    """The HTTP API of a server."""

    def __init__(self, url: str) -> None:
        self._http = httpx2.Client(
            base_url=f"{url}/api/v1", trust_env=False, verify=False
        )  # one: certificates load slowly

    def ask(self, path: str, **parameters: str) -> Any:
        answer = self._http.get(path, params=parameters)
        assert answer.json()["status"] == "success", (parameters, answer.text)
        return answer.json()["data"]

    def values(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def wait(self, holds: Callable[[], bool], what: str = "") -> None:
        until = time.monotonic() + WAIT_S
        while not _quietly(holds):
            assert time.monotonic() < until, (what, self.ask("targets")["activeTargets"])
            time.sleep(0.1)

    def wait_for(self, expression: str) -> None:
        """Until it returns anything: a rate needs two scrapes."""
        self.wait(lambda: bool(self.values(expression)), expression)


def _quietly(holds: Callable[[], bool]) -> bool:
    try:
        return holds()
    except httpx2.HTTPError:  # it is starting
        return False


@contextmanager
def watching(folder: Path, targets: Path, token_file: Path) -> Iterator[Prometheus]:
    """A server with the rendered configuration, but an impatient one."""
    assert PROMETHEUS is not None
    for name, text in render_monitoring(targets=str(targets), token_file=str(token_file)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    path = folder / "prometheus" / "prometheus.yml"
    values = yaml.safe_load(path.read_text())
    values["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    path.write_text(yaml.safe_dump(values))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    options = {"config.file": path, "storage.tsdb.path": folder / "data", "web.listen-address": address}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [PROMETHEUS, *(f"--{name}={value}" for name, value in options.items())], stdout=log, stderr=log
        ) as process,
    ):
        try:
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()


@pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus (Debian: apt-get install prometheus)")
def test_prometheus_finds_a_job_by_its_file_and_answers_every_panel_and_alert(job_file: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    targets = tmp_path / "targets"
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
    told = {"host": "127.0.0.2", "port": port, "token_file": tmp_path / "token", "targets": targets}
    given = [f"api.{name}={value}" for name, value in told.items()]
    with watching(tmp_path, targets, tmp_path / "token") as prometheus:
        with launched(job_file, *given, "nodes=2", "train.steps=100000", name="watched") as job:
            job.wait_training()
            assert read_token(job.run.directory) == TOKEN
            assert read_contact(job.run.directory) == f"http://127.0.0.2:{port}"
            prometheus.wait(lambda: len(prometheus.values("up == 1")) == 3)
            found = prometheus.values("up")
            assert {entry["metric"]["instance"].partition(":")[0] for entry in found} == {"127.0.0.2"}
            roles = [(entry["metric"]["role"], entry["metric"]["run"]) for entry in found]
            assert sorted(roles) == [("agent", "watched"), ("agent", "watched"), ("controller", "watched")]
            prometheus.wait_for("increase(evermesh_trained_steps_total[10s]) > 0")
            for query in (query for _, panels in ROWS for panel in panels for query in panel.queries):
                asked = query.expr.replace("$run", ".+").replace("$__rate_interval", "30s")
                if any(name in asked for name in RARE):
                    prometheus.values(asked)
                else:
                    prometheus.wait_for(asked)
            (group,) = prometheus.ask("rules")["groups"]
            assert [rule["name"] for rule in group["rules"]] == [alert.name for alert in ALERTS]
            prometheus.wait(lambda: _healthy(prometheus))
            assert evermesh("stop", "watched", "--runs", job.run.directory.parent).returncode == 0
        assert json.loads((targets / "watched.json").read_text()) == []


def _healthy(prometheus: Prometheus) -> bool:
    (group,) = prometheus.ask("rules")["groups"]
    assert not any(rule.get("lastError") for rule in group["rules"]), group
    return all(rule["health"] == "ok" for rule in group["rules"])


def test_a_job_whose_port_somebody_has_does_not_begin(job_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = evermesh("launch", job_file, "--set", f"api.port={port}")
    assert refused.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in refused.stderr


def test_a_given_token_replaces_the_one_of_the_run_and_must_be_long(tmp_path: Path) -> None:
    given = tmp_path / "given"
    made = make_token(tmp_path)
    assert make_token(tmp_path) == made
    given.write_text(f"{TOKEN}\n")
    assert make_token(tmp_path, given) == make_token(tmp_path) == TOKEN
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    for wrong in ("", "secret", f"{TOKEN} {TOKEN}", f"{TOKEN}\nX-Forged: 1"):
        given.write_text(wrong)
        with pytest.raises(ListenInvalid, match="holds no token of 32"):
            make_token(tmp_path, given)
    with pytest.raises(ListenInvalid, match="cannot be read"):
        make_token(tmp_path, tmp_path / "missing")
    assert make_token(tmp_path) == TOKEN
