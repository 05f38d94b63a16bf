"""A job whose nodes are told apart by a topology file: its nodes take the best order, and train the same."""

import json
from pathlib import Path

import pytest

from evermesh.fault.events import read_events
from evermesh.launcher.admission import check_topology
from evermesh.launcher.errors import LayoutRequestInvalid
from evermesh.launcher.job_file import load_job
from tests.launcher.jobs import launched
from tests.launcher.test_cli import evermesh

SHAPE = ("workers=3", "train.steps=3", "train.layout.pp=3", "train.model.layers=3")
PATIENT = ("train.layout.capacity=256", "join_timeout_s=300")
RACKS = """
nodes:
  - {name: node-0, devices: 1, rack: a}
  - {name: node-1, devices: 1, rack: b}
  - {name: node-2, devices: 1, rack: a}
"""


def test_nodes_of_one_rack_take_neighbouring_stages_and_the_losses_are_the_same_bit_for_bit(job_file: Path) -> None:
    topology = job_file.with_name("topology.yaml")
    topology.write_text(RACKS)
    losses = {}
    for name, overrides in (("plain", []), ("ordered", ["nodes=3", f"topology={topology}"])):
        with launched(job_file, *SHAPE, *PATIENT, *overrides, name=name) as job:
            job.wait(lambda: bool(job.client.status().nodes), 300)
            job.wait_training()
            told = evermesh("nodes", str(job.run.directory), "--json")
            code, stdout, stderr = job.end(300)
            assert code == 0, stderr
            losses[name] = job.losses
            [attempt] = [entry for entry in job.journal if entry.kind == "attempt"]
            ordered = [event.text for event in read_events(job.run.events) if event.kind == "nodes ordered"]
            if name == "plain":
                assert (attempt.fields["nodes"], ordered) == (["node-0"], [])
            else:
                assert attempt.fields["nodes"] == ["node-0", "node-2", "node-1"]
                assert len(ordered) == stdout.count("nodes take places") == 1
            if told.returncode == 0:  # the job may have been quicker
                assert all(node["hardware"]["nics"] for node in json.loads(told.stdout))
    assert losses["plain"] == losses["ordered"]
    assert len(losses["plain"]) == 3


def test_a_topology_that_cannot_be_read_is_refused_before_anything_starts(job_file: Path) -> None:
    with pytest.raises(LayoutRequestInvalid, match=r"nowhere\.yaml is no file .*Give the path of a topology"):
        check_topology(load_job(job_file, ["topology=nowhere.yaml"]))
