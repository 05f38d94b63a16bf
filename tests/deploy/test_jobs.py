"""Every example job can be launched: it is read, its layout fits, a batch is planned, and it is rendered for every place."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from evermesh.launcher import load_job
from evermesh.launcher.commands.app import app
from evermesh.launcher.config import JobConfig
from evermesh.launcher.drawn_batches import drawn_batches
from evermesh.launcher.layouts import LengthsAsked, Source
from evermesh.launcher.planning import Case, Degrees, read_case, read_lengths
from evermesh.parallelism.layout.device import DEVICES
from evermesh.parallelism.layout.ranked import RankedLayout
from evermesh.parallelism.layout.search import estimate_layout, search_layouts
from evermesh.parallelism.verifier import verify_plan

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "deploy" / "jobs"
LENGTHS = JOBS / "lengths.txt"
FILES = sorted(path for path in JOBS.glob("*.yaml"))
ON_GPUS = [path for path in FILES if path.stem != "quickstart"]
NEAR = {"own-text": 1.05, "fine-tune": 1.05, "racks": 1.05, "long-context": 1.06, "experts": 1.25, "frontier": 1.2}
"""How much longer than with the fastest layout that the search finds a step may take, by formula; the files say why."""
LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def _folder_with_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of a job are relative to where it is launched; there the model to fine-tune is."""
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "config.json").write_text(json.dumps(LLAMA_8B))
    monkeypatch.chdir(tmp_path)


def estimated(path: Path, job: JobConfig) -> RankedLayout:
    """What the layout of the file needs on nodes with GPUs of 80 GiB."""
    source = Source.read(path)
    lengths, vocabulary = source.lengths(LengthsAsked(LENGTHS), Console(stderr=True))
    topology = DEVICES["h100"].topology(job.nodes, job.workers // job.nodes)
    return estimate_layout(source.model.shape(vocabulary), topology, lengths, job.train.layout, source.options(None))


def planned(path: Path, job: JobConfig) -> Case:
    return read_case(path, Degrees(ranks_per_node=job.workers // job.nodes), sample=LENGTHS)


def test_all_examples_are_listed() -> None:
    listed = (ROOT / "deploy" / "README.md").read_text()
    assert {path.stem for path in FILES} == {"quickstart", *NEAR}
    for path in FILES:
        assert f"(jobs/{path.name})" in listed


@pytest.mark.parametrize("path", ON_GPUS, ids=lambda path: path.stem)
def test_the_layout_of_an_example_fits_into_memory_and_a_batch_is_planned_near_its_bound(path: Path) -> None:
    job = load_job(path)
    assert job.train.layout.world_size == job.workers
    found = estimated(path, job)
    assert found.memory.total < DEVICES["h100"].memory_bytes, found.memory.parts
    case = planned(path, job)
    data = job.train.data
    (lengths,) = drawn_batches(read_lengths(LENGTHS), data.context, data.batch_tokens)
    verify_plan(case.plan, lengths, case.layout, cost=case.cost, pool=case.pool)
    assert 1.0 <= case.plan.certificate.ratio < 1.1, case.plan.certificate


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("place", ["slurm", "docker", "kubernetes", "kuberay"])
def test_an_example_is_rendered_for_every_place(place: str, path: Path, tmp_path: Path) -> None:
    options = ["--image", "registry/evermesh:1"] if place in ("kubernetes", "kuberay") else []
    done = CliRunner().invoke(app, ["deploy", place, str(path), "--output", str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    assert any((tmp_path / "out").iterdir())


def test_no_other_layout_is_much_faster_than_that_of_the_example_of_1024_gpus() -> None:
    _is_among_the_best(JOBS / "long-context.yaml")


@pytest.mark.parity
@pytest.mark.parametrize("name", NEAR)
def test_no_layout_at_all_is_much_faster(name: str) -> None:
    _is_among_the_best(JOBS / f"{name}.yaml")


def _is_among_the_best(path: Path) -> None:
    job, source = load_job(path), Source.read(path)
    lengths, vocabulary = source.lengths(LengthsAsked(LENGTHS), Console(stderr=True))
    options = source.options(None).model_copy(update={"planned": 0, "top": 1})
    topology = DEVICES["h100"].topology(job.nodes, job.workers // job.nodes)
    (best,) = search_layouts(source.model.shape(vocabulary), topology, lengths, options)
    assert estimated(path, job).step.total <= NEAR[path.stem] * best.step.total, best.layout


def test_a_batch_of_a_job_is_drawn_from_a_sample_and_split_at_its_context() -> None:
    (batch,) = drawn_batches(read_lengths(LENGTHS), 131_072, 8_000_000)
    assert max(batch) <= 131_072
    assert 7_500_000 < sum(batch) <= 8_000_000
    assert drawn_batches(read_lengths(LENGTHS), 131_072, 8_000_000) == [batch]
