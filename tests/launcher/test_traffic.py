"""``evermesh traffic plan``: loads by hash and by plan, files that bring it about, other jobs, wrong input."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from evermesh.launcher.commands.app import app
from evermesh.launcher.topology_file import read_topology
from evermesh.parallelism.errors import EvermeshError
from evermesh.parallelism.fabric.wiring import Wiring

EXAMPLE = Path(__file__).resolve().parents[2] / "deploy" / "topologies" / "leaf-spine.yaml"


@pytest.fixture
def job(job_file: Path) -> Path:
    """16 ranks: each model on the four devices of a node, two stages."""
    values = yaml.safe_load(job_file.read_text())
    values["workers"] = 16
    values["train"]["model"] = {"hidden": 64, "layers": 4, "heads": 4, "kv_heads": 4, "ffn": 128}
    values["train"]["layout"] = {"pp": 2, "hdp": 2, "tp": 4, "capacity": 512}
    job_file.write_text(yaml.safe_dump(values))
    return job_file


def _run(job: Path, *arguments: str | Path) -> str:
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    wanted = ["traffic", "plan", str(job), "--topology", *map(str, arguments)]
    found = CliRunner().invoke(app, wanted, env=environment, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def _json(job: Path, *arguments: str | Path) -> dict[str, Any]:
    return json.loads(_run(job, *arguments, "--json"))


def test_the_example_is_planned_and_explained(job: Path, tmp_path: Path) -> None:
    text = _run(job, EXAMPLE, "--settings", tmp_path / "settings", "--failed", "leaf0.0l-spine1")
    for words in (
        "small: pp 2 x hdp 2 x tp 4 on 4 nodes with 16 roce cards, 16 leaves and 4 spines",
        "between leaves and spines",
        "pp pipeline forward (send)",
        "times less on the busiest link than a hash (median of 20), ",
        "Broken: leaf0.0l-spine1: ",
        "needs a NCCL net plugin: the spine of each stream.",
        "enforced: rings and trees keep their rails. NCCL_CROSS_NIC=0",
    ):
        assert words in text, text
    written = {path.name: path.read_text() for path in (tmp_path / "settings").iterdir()}
    assert set(written) == {"all.env", "hostfile", "paths.json"}
    assert written["hostfile"] == "".join(f"node{at} slots=4\n" for at in range(4))
    assert "NCCL_IB_HCA==mlx5_0,mlx5_1,mlx5_2,mlx5_3\nNCCL_IB_QPS_PER_CONNECTION=2\n" in written["all.env"]
    streams = json.loads(written["paths.json"])["streams"]
    assert {spine for *_, spine, _ in streams} <= {None, *(f"spine{at}" for at in range(4))}
    cut = [
        row
        for row in streams
        if row[3] == "spine1" and row[1].endswith("mlx5_0/0") and row[1][:5] in ("node0", "node1")
    ]
    assert not cut


def test_the_json_has_every_link_and_agrees_with_the_certificate(job: Path) -> None:
    found = _json(job, EXAMPLE, "--streams", "2", "--seeds", "5")
    assert max(found["links_s"].values()) == pytest.approx(found["plan_s"])
    assert len(found["hash_s"]) == 5
    assert found["bound_s"] <= found["plan_s"] <= min(found["hash_s"]) * (1 + 1e-9)
    assert found["is_optimal"]
    assert found["nodes"] == [f"node{at}" for at in range(4)]
    total = sum(row["node_bytes"] for row in found["rails"])
    assert total == pytest.approx(found["bytes_leaving_nodes"])
    sent = sum(seconds * 25e9 for link, seconds in found["links_s"].items() if link.startswith("node"))
    assert sent == pytest.approx(total), "ports send all that leaves nodes"
    assert {row["rail_bytes"] for row in found["rails"]} == {0.0}
    without = _json(job, EXAMPLE, "--no-pxn", "--algorithm", "tree", "--keep-order")
    assert without["bytes_leaving_nodes"] == pytest.approx(total)


def test_a_job_makes_room_for_another_that_is_registered(job: Path, tmp_path: Path) -> None:
    registry = tmp_path / "loads.json"
    alone = _json(job, EXAMPLE, "--registry", registry, "--step-s", "2")
    links = json.loads(registry.read_text())["jobs"]["small"]
    assert links == pytest.approx({link: seconds * _speed(link) / 2 for link, seconds in alone["links_s"].items()})
    values = json.loads(registry.read_text())
    values["jobs"] = {"other": {"leaf0.0l>spine0": 12.5e9 * 0.5}}
    registry.write_text(json.dumps(values))
    found = _json(job, EXAMPLE, "--registry", registry, "--step-s", "2")
    assert found["links_s"]["leaf0.0l>spine0"] == 1.0  # of 2 s; nothing of this job
    assert sorted(json.loads(registry.read_text())["jobs"]) == ["other", "small"]
    registry.write_text("{}")
    with pytest.raises(EvermeshError, match="no file of link loads"):
        _run(job, EXAMPLE, "--registry", registry)


def test_a_job_of_one_node_has_no_paths(job: Path) -> None:
    values = yaml.safe_load(job.read_text())
    values["workers"] = 4
    values["train"]["layout"] = {"hdp": 1, "tp": 4, "capacity": 1024}
    job.write_text(yaml.safe_dump(values))
    text = _run(job, EXAMPLE, "--nodes", "node1")
    assert "on 1 node with 4 roce cards" in text
    assert "Nothing leaves a node: there are no paths to plan." in text


def test_what_deepspeed_sends_is_not_known(job: Path) -> None:
    values = yaml.safe_load(job.read_text())
    values["train"]["layout"] = {"hdp": 16, "capacity": 512, "sharding": {"kind": "deepspeed"}}
    job.write_text(yaml.safe_dump(values))
    with pytest.raises(EvermeshError, match="has DeepSpeed divide gradients and states"):
        _run(job, EXAMPLE)


def _speed(link: str) -> float:
    return 25e9 if "/" in link else 12.5e9


def test_some_nodes_of_a_cluster_are_named_in_any_order(job: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(EXAMPLE.read_text())
    values["nodes"].append(values["nodes"][0] | {"name": "spare"})
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump(values))
    names = "node2,node0,node3,node1"
    found = _json(job, cluster, "--nodes", names, "--keep-order")
    assert found["nodes"] == names.split(",")
    ordered = _json(job, cluster, "--nodes", names)
    assert ordered["bytes_between_leaves"]["order"] <= ordered["bytes_between_leaves"]["given"]
    with pytest.raises(EvermeshError, match=r"16 ranks, the 5 nodes have 20 devices\. Name the nodes"):
        _run(job, cluster)
    with pytest.raises(EvermeshError, match="has no node node9"):
        _run(job, cluster, "--nodes", "node9")


def test_an_error_in_a_topology_names_line_and_key(tmp_path: Path) -> None:
    text = EXAMPLE.read_text()
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if "mlx5_2" in line)
    lines[at] = lines[at].replace("50e9", "-1")
    path = tmp_path / "wrong.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(EvermeshError, match=rf"wrong.yaml:{at + 1}: nodes.0.nics.2.bytes_per_s: .*greater than 0"):
        read_topology(path)
    path.write_text(text.replace("leaf0.3l, leaf0.3r", "leaf0.3l, leaf9", 1))
    with pytest.raises(EvermeshError, match="card mlx5_3 of node node0 is wired to leaf leaf9"):
        read_topology(path)


def test_the_example_is_what_its_head_says() -> None:
    wiring = Wiring.of(read_topology(EXAMPLE))
    assert (len(wiring.nodes), wiring.devices, len(wiring.cards)) == (4, 4, 16)
    assert (wiring.trunk_bytes_per_s == 12.5e9).all()
    assert wiring.trunk_bytes_per_s.shape == (16, 4)
    assert (wiring.port_bytes_per_s == 25e9).all()
