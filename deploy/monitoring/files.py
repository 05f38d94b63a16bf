"""The files that Prometheus and Grafana read when they start."""

import json
from typing import Any

import yaml

from evermesh.deploy.monitoring.alerts import rules
from evermesh.deploy.monitoring.dashboard import DATASOURCE, dashboard

_SCRAPE_S = 10
_DASHBOARDS = "/etc/grafana/dashboards"


def render_monitoring(*, targets: str, token_file: str, prometheus: str = "http://localhost:9090") -> dict[str, str]:
    """By file name: ``prometheus/`` is its folder of configuration, ``grafana/`` holds what Grafana is provisioned with.

    Args:
        targets: folder, or file, in which controllers write where they and their agents serve numbers.
        token_file: the token that they ask for, as Prometheus sees it.
        prometheus: where Grafana reaches it.
    """
    return {
        "prometheus/prometheus.yml": _yaml(_prometheus(targets, token_file)),
        "prometheus/evermesh-rules.yml": _yaml(rules()),
        "grafana/provisioning/datasources/evermesh.yaml": _yaml(_datasources(prometheus)),
        "grafana/provisioning/dashboards/evermesh.yaml": _yaml(_provider()),
        "grafana/dashboards/evermesh.json": json.dumps(dashboard(), indent=1) + "\n",
    }


def _yaml(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=10_000)


def _prometheus(targets: str, token_file: str) -> dict[str, Any]:
    files = targets if targets.endswith(".json") else f"{targets.rstrip('/')}/*.json"
    job = {
        "job_name": "evermesh",
        "honor_labels": True,  # node and rank are what the controller says they are of
        "authorization": {"credentials_file": token_file},
        "file_sd_configs": [{"files": [files], "refresh_interval": "30s"}],
    }
    every = f"{_SCRAPE_S}s"
    return {
        "global": {"scrape_interval": every, "evaluation_interval": every},
        "rule_files": ["evermesh-rules.yml"],
        "scrape_configs": [job],
    }


def _datasources(url: str) -> dict[str, Any]:
    source = {
        "name": "Evermesh",
        **DATASOURCE,
        "access": "proxy",
        "url": url,
        "isDefault": True,
        "jsonData": {"timeInterval": f"{_SCRAPE_S}s", "httpMethod": "POST"},
    }
    return {"apiVersion": 1, "datasources": [source]}


def _provider() -> dict[str, Any]:
    provider = {
        "name": "evermesh",
        "type": "file",
        "allowUiUpdates": False,
        "options": {"path": _DASHBOARDS},
    }
    return {"apiVersion": 1, "providers": [provider]}
