"""The dashboard and the alerts speak only of numbers that exist, and fit together; what Prometheus itself says of them."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from evermesh.deploy import render_monitoring
from evermesh.deploy.monitoring import ALERTS, ROWS, dashboard
from tests.deploy.alert_cases import CASES, Case
from tests.deploy.numbers import every_number

FILES = render_monitoring(targets="/targets", token_file="/run/secrets/token", prometheus="http://prometheus:9090")
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool (Debian: apt-get install prometheus)")
UNITS = {"none", "short", "s", "bytes", "Bps", "percentunit", "dtdurations", "locale", "suffix: nats"}
"""Identifiers of Grafana's units that we use, each looked up in its list of them."""
KINDS = {"row", "timeseries", "stat", "state-timeline", "table"}


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *map(str, arguments)], capture_output=True, text=True, check=False)


def expressions() -> Iterator[str]:
    """Of all panels and alerts."""
    yield from (query.expr for _, panels in ROWS for panel in panels for query in panel.queries)
    yield from (alert.expr for alert in ALERTS)


def legends() -> Iterator[tuple[str, str]]:
    yield from ((query.expr, query.legend) for _, panels in ROWS for panel in panels for query in panel.queries)
    yield from ((alert.expr, alert.text) for alert in ALERTS)


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bevermesh_\w+|\bup(?=\{)", re.sub(r'"[^"]*"', '""', expression)))


def test_no_panel_and_no_alert_names_a_number_or_a_label_that_does_not_exist(tmp_path: Path) -> None:
    known = every_number(tmp_path)
    for expression in expressions():
        names = names_in(expression)
        assert names, expression
        assert names <= known.keys(), expression
        labels = set().union(*(known[name] for name in names))
        asked = {
            label for inner in re.findall(r"\{([^}]*)\}", expression) for label in re.findall(r"(\w+)\s*[=!]", inner)
        }
        grouped = {
            word for inner in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for word in re.split(r",\s*", inner)
        }
        assert asked | grouped <= labels, expression
    for expression, text in legends():
        labels = set().union(*(known[name] for name in names_in(expression)))
        assert set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)", text)) <= labels, text


def test_a_number_that_does_not_exist_is_found_out(tmp_path: Path) -> None:
    assert names_in('rate(evermesh_sent_bytes{run="evermesh_x"}[1m])') == {"evermesh_sent_bytes"}
    assert "evermesh_sent_bytes" not in every_number(tmp_path)  # a counter: it ends in _total


def test_every_panel_of_the_dashboard_has_its_place_and_its_source() -> None:
    board = dashboard()
    assert json.loads(FILES["grafana/dashboards/evermesh.json"]) == board
    panels = board["panels"]
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [title for title, _ in ROWS]
    assert len({panel["id"] for panel in panels}) == len(panels) > 30
    for panel in panels:
        place = panel["gridPos"]
        assert panel["type"] in KINDS
        assert place["x"] >= 0
        assert place["w"] > 0
        assert place["x"] + place["w"] <= 24, panel["title"]
    for one, other in combinations(panels, 2):
        assert not _overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])
    for panel in panels:
        if panel["type"] == "row":
            continue
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        queries = panel["targets"]
        assert [query["refId"] for query in queries] == [chr(ord("A") + index) for index in range(len(queries))]
        assert all(query["datasource"] == panel["datasource"] for query in queries)
        assert all("$run" in query["expr"] for query in queries), panel["title"]


def _overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    across = one["x"] < other["x"] + other["w"] and other["x"] < one["x"] + one["w"]
    return across and one["y"] < other["y"] + other["h"] and other["y"] < one["y"] + one["h"]


def test_grafana_is_provisioned_with_the_source_and_the_folder_that_the_dashboard_needs() -> None:
    (source,) = yaml.safe_load(FILES["grafana/provisioning/datasources/evermesh.yaml"])["datasources"]
    board = dashboard()
    assert {panel["datasource"]["uid"] for panel in board["panels"] if "datasource" in panel} == {source["uid"]}
    (variable,) = board["templating"]["list"]
    assert variable["datasource"]["uid"] == source["uid"]
    assert (variable["name"], source["url"]) == ("run", "http://prometheus:9090")
    (provider,) = yaml.safe_load(FILES["grafana/provisioning/dashboards/evermesh.yaml"])["providers"]
    assert provider["options"]["path"] == "/etc/grafana/dashboards"


def test_prometheus_reads_targets_and_the_token_from_files() -> None:
    (job,) = yaml.safe_load(FILES["prometheus/prometheus.yml"])["scrape_configs"]
    assert job["authorization"] == {"credentials_file": "/run/secrets/token"}
    assert job["file_sd_configs"][0]["files"] == ["/targets/*.json"]
    of_file = render_monitoring(targets="/runs/a/prometheus.json", token_file="/runs/a/token")
    (job,) = yaml.safe_load(of_file["prometheus/prometheus.yml"])["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/runs/a/prometheus.json"]


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)
    assert {case.alert for case in CASES} == {alert.name for alert in ALERTS}
    for alert in ALERTS:
        assert "{{ $labels." in alert.text
        assert alert.way_out.endswith((".", "`"))


@pytest.mark.parity
def test_the_types_of_grafana_take_the_dashboard_and_give_it_back() -> None:
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")  # Grafana's own; not needed for development
    board = dashboard()
    back = json.loads(json.dumps(models.Dashboard.from_json(board), default=lambda part: part.to_json()))
    assert back.keys() >= board.keys()
    for panel, again in zip(board["panels"], back["panels"], strict=True):
        assert {name: again[name] for name in panel} == panel
    board["panels"][1]["gridPoss"] = {}
    again = models.Dashboard.from_json(board).to_json()["panels"][1].to_json()
    assert "gridPoss" not in again, "what Grafana does not know does not come back"


@needs_promtool
def test_prometheus_accepts_configuration_and_rules(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x" * 32)
    files = render_monitoring(targets=str(tmp_path), token_file=str(tmp_path / "token"))
    for name in ("prometheus.yml", "evermesh-rules.yml"):
        (tmp_path / name).write_text(files[f"prometheus/{name}"])
    done = promtool("check", "config", tmp_path / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout
    (tmp_path / "prometheus.yml").write_text(
        files["prometheus/prometheus.yml"].replace("credentials_file", "credential_file")
    )
    assert promtool("check", "config", tmp_path / "prometheus.yml").returncode != 0


@needs_promtool
def test_every_alert_fires_when_it_should_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "evermesh-rules.yml").write_text(FILES["prometheus/evermesh-rules.yml"])
    tests = {
        "rule_files": ["evermesh-rules.yml"],
        "evaluation_interval": "30s",
        "tests": [_test(case) for case in CASES],
    }
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(tests))
    done = promtool("test", "rules", tmp_path / "tests.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def _test(case: Case) -> dict[str, Any]:
    (alert,) = (alert for alert in ALERTS if alert.name == case.alert)
    fired = {
        "exp_labels": {**case.labels, "severity": alert.severity},
        "exp_annotations": {"summary": case.summary, "description": alert.way_out},
    }
    times: list[dict[str, Any]] = [
        {"eval_time": case.quiet_at, "alertname": case.alert, "exp_alerts": []},
        {"eval_time": case.fires_at, "alertname": case.alert, "exp_alerts": [fired]},
    ]
    if case.quiet_again_at is not None:
        times.append({"eval_time": case.quiet_again_at, "alertname": case.alert, "exp_alerts": []})
    series = [{"series": name, "values": values} for name, values in case.series.items()]
    return {"interval": "1m", "name": case.alert, "input_series": series, "alert_rule_test": times}
