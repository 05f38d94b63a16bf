"""``evermesh nodes --cluster``, ``--why``, ``cordon`` and ``uncordon``: no job is needed for them."""

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from evermesh.fault.cluster.identity import NodeIdentity, full_name
from evermesh.fault.cluster.records import Evidence
from evermesh.fault.cluster.store import ClusterStore
from evermesh.launcher.cluster_nodes import _seconds
from evermesh.launcher.commands.app import app
from evermesh.launcher.errors import ClusterRequestInvalid
from evermesh.parallelism.errors import EvermeshError


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterStore:
    """Two nodes: one was lost twice, and its computations cannot be trusted; of the other little is known."""
    monkeypatch.setenv("EVERMESH_CLUSTER", str(tmp_path))
    found, now_s = ClusterStore(tmp_path), time.time()
    bad, good = NodeIdentity(name="gpu1/10.0.0.1", machine="m1"), NodeIdentity(name="gpu2/10.0.0.2", machine="m2")
    seen = [(bad, "node lost", 7200.0), (bad, "silent corruption", 60.0), (good, "keeper lost", 3600.0)]
    found.add(
        Evidence(time_s=now_s - ago_s, node=node, kind=kind, job="llama", text=f"what {kind} says")
        for node, kind, ago_s in seen
    )
    return found


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_all_known_nodes_are_listed_with_what_speaks_against_them() -> None:
    rows = json.loads(run("nodes", "--cluster", "--json").stdout)
    assert [(row["node"], row["state"], row["evidence"], row["newest"]["kind"]) for row in rows] == [
        ("gpu1/10.0.0.1", "suspect", 2, "silent corruption"),
        ("gpu2/10.0.0.2", "ok", 1, "keeper lost"),
    ]
    assert rows[0]["probability"] == pytest.approx(1 - (1 - 0.4) * (1 - 0.9), abs=0.01)
    table = run("nodes", "--cluster").stdout
    assert "silent corruption" in table
    assert "suspect" in table


def test_why_tells_the_chain_of_evidence() -> None:
    told = run("nodes", "--why", "gpu1").stdout.splitlines()
    assert told[0].startswith("gpu1/10.0.0.1: suspect; 0.94 (corruption 0.90, crash 0.4")
    assert [line.split("  ")[2] for line in told[1:]] == [
        "node lost (crash, says 0.40, 99% left)",
        "silent corruption (corruption, says 0.90, 100% left)",
    ]
    assert told[1].endswith("llama: what node lost says")
    (row,) = json.loads(run("nodes", "--why", "10.0.0.1", "--json").stdout)
    assert [one["kind"] for one in row["chain"]] == ["node lost", "silent corruption"]
    unknown = run("nodes", "--why", "gpu9")
    assert isinstance(unknown.exception, ClusterRequestInvalid)
    assert "Known there: gpu1/10.0.0.1, gpu2/10.0.0.2" in str(unknown.exception)


def test_cordons_are_shown_and_lifted_by_node_and_by_host(store: ClusterStore) -> None:
    said = run("cordon", "gpu1", "--because", "fan 3", "--for", "2h").stdout
    assert said.startswith("gpu1 is cordoned until ")
    assert "fan 3" in said
    run("cordon", "node-1", "--because", "disk")
    rows = {row["node"]: row for row in json.loads(run("nodes", "--cluster", "--json").stdout)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "gpu1/10.0.0.1": "cordoned",
        "gpu2/10.0.0.2": "ok",
        full_name("node-1"): "cordoned",
    }
    assert 7100 < rows["gpu1/10.0.0.1"]["cordon"]["until_s"] - time.time() < 7200
    part = run("uncordon", "gpu1/10.0.0.1").stdout
    assert part.startswith("gpu1/10.0.0.1 may not be used yet: gpu1 is cordoned")
    assert run("uncordon", "gpu1").stdout.strip() == "gpu1 may be used again"
    assert "was not cordoned; what spoke against it is forgiven" in run("uncordon", "gpu2").stdout
    rows = {row["node"]: row for row in json.loads(run("nodes", "--cluster", "--json").stdout)}
    assert [rows[name]["evidence"] for name in ("gpu1/10.0.0.1", "gpu2/10.0.0.2")] == [0, 0]
    assert len(store.read().records) == 8, "all of it is kept"


def test_what_is_no_cordon_is_refused_with_the_way_out() -> None:
    for given, told in ((("--because", " "), "needs a reason"), (("--because", "x", "--for", "soon"), "such as 2h")):
        done = run("cordon", "gpu1", *given)
        assert isinstance(done.exception, EvermeshError)
        assert told in str(done.exception)
    assert [_seconds(text) for text in ("90s", "1.5m", "2h", "7d")] == [90.0, 90.0, 7200.0, 604800.0]


def test_damaged_lines_are_told(store: ClusterStore, tmp_path: Path) -> None:
    (file,) = tmp_path.rglob("*.jsonl")
    with file.open("a") as lines:
        lines.write("not a record\n")
    done = run("nodes", "--cluster")
    assert done.exit_code == 0
    assert "line 4, is no record and is skipped" in done.output
