"""Prometheus and Grafana beside a job: what is mounted, told and opened fits together."""

import pytest
import yaml

from evermesh.deploy import render_docker
from evermesh.launcher import load_job
from tests.deploy.test_rendering import DEPLOYMENT, JOB, ON_CPU


def test_compose_runs_prometheus_and_grafana_beside_the_job_and_opens_nothing_but_the_loopback() -> None:
    files = render_docker(DEPLOYMENT)
    compose = yaml.safe_load(files["compose.yaml"])
    services = compose["services"]
    assert services.keys() == {"job", "prometheus", "grafana"}
    published = {name: service.get("ports", []) for name, service in services.items()}
    assert published == {"job": ["127.0.0.1:8470:8470"], "prometheus": [], "grafana": ["127.0.0.1:3000:3000"]}
    for service in services.values():
        assert set(service["secrets"]) <= compose["secrets"].keys()
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            is_rendered = any(f"./{name}".startswith(f"{source}") for name in files)
            assert source in compose["volumes"] or source == DEPLOYMENT.runs or is_rendered, volume
    settings = dict(word.split("=", 1) for word in services["job"]["command"] if "=" in word)
    told = {name.removeprefix("api."): value for name, value in settings.items() if name.startswith("api.")}
    assert told == {"host": "job", "port": "8470", "token_file": "/run/secrets/token", "targets": "/targets"}
    (job,) = yaml.safe_load(files["monitoring/prometheus/prometheus.yml"])["scrape_configs"]
    assert job["authorization"]["credentials_file"] == told["token_file"]
    assert job["file_sd_configs"][0]["files"] == [f"{told['targets']}/*.json"]
    (source,) = yaml.safe_load(files["monitoring/grafana/provisioning/datasources/evermesh.yaml"])["datasources"]
    assert source["url"] == "http://prometheus:9090"
    load_job(JOB, [f"{name}={value}" for name, value in settings.items()])


@pytest.mark.parity
@pytest.mark.parametrize("monitoring", [True, False])
def test_the_compose_specification_accepts_the_file_and_refuses_others(monitoring: bool) -> None:
    compose_spec = pytest.importorskip("compose_spec")  # not among what development needs
    for deployment in (DEPLOYMENT, ON_CPU):
        text = render_docker(deployment, monitoring=monitoring)["compose.yaml"]
        compose_spec.PyCompose.from_yaml(text).validate()
    for right, wrong in (("restart: 'no'", "restart: sometimes"), ("shm_size:", "shm_sizes:"), ("60s", "soon")):
        assert right in text
        with pytest.raises(Exception, match=r"sometimes|shm_sizes|soon"):
            compose_spec.PyCompose.from_yaml(text.replace(right, wrong)).validate()
