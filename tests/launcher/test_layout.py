"""``evermesh layout``: the fastest layouts, why, and what to paste; wrong input is one line with the way out."""

import json
from pathlib import Path

import pytest
import yaml

from evermesh.launcher.job_file import load_job
from evermesh.launcher.layouts import LengthsAsked, Source
from evermesh.parallelism import Layout
from evermesh.parallelism.layout.device import DEVICES
from tests.launcher.test_cli import evermesh

MODEL = {"hidden": 1024, "layers": 8, "heads": 16, "kv_heads": 8, "ffn": 2816, "vocabulary": 32000}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(MODEL))
    return path


def test_the_layouts_of_a_model_are_ranked_explained_and_ready_to_paste(model: Path, job_file: Path) -> None:
    arguments = ("--nodes", "2", "--context", "2048", "--batch-tokens", "262144", "--planned", "2", "--top", "2")
    found = evermesh("layout", model, *arguments)
    assert found.returncode == 0, found.stderr
    assert "parameters on 16 h100 in 2 nodes, 80 GiB each; steps of 262,144 tokens" in found.stdout
    assert "MFU (causal)" in found.stdout
    assert "% longer" in found.stdout
    pasted = yaml.safe_load(found.stdout[found.stdout.index("train:") :])
    layout = Layout.model_validate(pasted["train"]["layout"])
    assert layout.world_size == 16
    loaded = load_job(job_file, ["workers=16", f"train.layout={json.dumps(pasted['train']['layout'])}"])
    assert loaded.train.layout == layout


def test_the_json_has_every_part_of_the_time_and_of_the_memory(model: Path) -> None:
    arguments = ("--context", "1024", "--planned", "0", "--convention", "full", "--device", "a100", "--json")
    ranked = json.loads(evermesh("layout", model, *arguments).stdout)
    assert 1 < len(ranked) <= 5
    for one in ranked:
        assert sum(one["parts_s"].values()) == pytest.approx(one["step_s"])
        assert sum(one["memory_parts_bytes"].values()) == pytest.approx(one["memory_bytes"])
        assert one["convention"] == "full"
    assert [one["step_s"] for one in ranked] == sorted(one["step_s"] for one in ranked)


def test_a_job_brings_its_workers_its_device_and_its_lengths(job_file: Path) -> None:
    found = evermesh("layout", job_file, "--planned", "0")
    assert found.returncode == 0, found.stderr
    assert "on 2 cpu in 1 node" in found.stdout
    assert "offload" not in found.stdout


def test_lengths_and_topology_may_come_from_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "lengths.txt").write_text("100\n5000\n300\n")
    (tmp_path / "topology.json").write_text(DEVICES["h100"].topology(1, 4).model_dump_json())
    arguments = ("--lengths", tmp_path / "lengths.txt", "--topology", tmp_path / "topology.json", "--planned", "0")
    found = evermesh("layout", model, *arguments, "--context", "2000", "--batch-tokens", "50000")
    assert found.returncode == 0, found.stderr
    assert "on 4 h100 in 1 node" in found.stdout
    assert "sequences of up to 2,000" in found.stdout


def test_batches_drawn_from_lengths_keep_within_their_tokens(model: Path, tmp_path: Path) -> None:
    (tmp_path / "lengths.txt").write_text("100\n700\n300\n")
    asked = LengthsAsked(tmp_path / "lengths.txt", context=400, batch_tokens=5000, batches=3)
    from rich.console import Console

    batches, _ = Source.read(model).lengths(asked, Console())
    assert len(batches) == 3
    assert all(4600 < sum(batch) <= 5000 for batch in batches)
    assert {length for batch in batches for length in batch} == {100, 300, 400}


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("hidden: wide\n", ("--context", "100"), "hidden: Input should be a valid integer"),
        ("hidden: 128\n", (), "--lengths FILE, or --context TOKENS"),
        ("hidden: 128\n", ("--context", "100", "--memory", "0.001"), "no layout fits into 0.0 GiB"),
        ("hidden: 128\n", ("--context", "100", "--topology", "none.json"), "none.json is no file"),
        ("hidden: 128\n", ("--context", "100", "--topology", "model.yaml"), "A topology has nodes"),
    ],
)
def test_wrong_input_is_one_line_with_the_way_out(
    text: str, arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.yaml").write_text(text)
    found = evermesh("layout", "model.yaml", *arguments)
    assert found.returncode == 2
    assert message in found.stderr
    assert found.stderr.count("\n") == 1
