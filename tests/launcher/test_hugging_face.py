"""From a Hugging Face directory to a job, and from its run back to one."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from evermesh.launcher import JobConfig, Run, load_job
from evermesh.launcher.errors import JobFileInvalid
from tests.launcher.test_cli import evermesh

SETTINGS = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 420,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
}

MIXTRAL = {name: value for name, value in SETTINGS.items() if name not in ("architectures", "head_dim")} | {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
}


def _directory(folder: Path, **changes: object) -> Path:
    directory = folder / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(SETTINGS | changes))
    return directory


def _job(folder: Path, init_from: Path, **model: object) -> Path:
    train: dict[str, object] = {"init_from": str(init_from), "data": {"sources": [{"kind": "stdlib"}]}}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({"train": train | ({"model": model} if model else {})}))
    return path


def test_the_model_of_a_job_is_the_one_of_the_directory_it_starts_from(tmp_path: Path) -> None:
    model = load_job(_job(tmp_path, _directory(tmp_path))).train.model
    assert (model.layers, model.head_dim, model.vocabulary, model.max_positions) == (2, 16, 420, 1024)
    assert model.qk_norm
    assert model.tied_embeddings
    longer = load_job(tmp_path / "job.yaml", ["train.model.rope_scaling={kind: linear, factor: 2.0}"]).train.model
    assert longer.rope_scaling is not None
    assert longer.model_copy(update={"rope_scaling": None}) == model


def test_a_job_that_gives_another_model_names_its_line_and_both_values(tmp_path: Path) -> None:
    path = _job(tmp_path, _directory(tmp_path), layers=3)
    with pytest.raises(
        JobFileInvalid, match=r"job\.yaml:\d+: train\.model\.layers is 3, but .*model has 2\. Leave it out"
    ):
        load_job(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "bert"},
            r"job\.yaml:\d+: train\.init_from: .*model_type is 'bert', which this version",
        ),
        ({"attention_bias": True}, "attention_bias is True, but only False is supported"),
        ({"num_attention_heads": 0}, "describes no model that can be built"),
    ],
)
def test_a_model_that_cannot_be_built_names_the_line(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(JobFileInvalid, match=message):
        load_job(_job(tmp_path, _directory(tmp_path, **changes)))


def test_a_directory_that_is_not_there_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(JobFileInvalid, match=r"train\.init_from: .*nowhere.*cannot be read"):
        load_job(_job(tmp_path, tmp_path / "nowhere"))


def test_what_a_run_writes_down_needs_the_directory_no_more(tmp_path: Path) -> None:
    from evermesh.launcher import write_job

    directory = _directory(tmp_path)
    config = load_job(_job(tmp_path, directory))
    write_job(config, tmp_path / "again.yaml")
    shutil.rmtree(directory)
    assert load_job(tmp_path / "again.yaml") == config
    assert isinstance(config, JobConfig)


def test_a_job_starts_from_a_directory_resumes_without_it_and_is_exported(job_file: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers: pip install 'evermesh[hf]'")
    import torch

    directory = tmp_path / "model"
    settings = {**SETTINGS, "vocab_size": 2100}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings))
    model.save_pretrained(directory)
    values = yaml.safe_load(job_file.read_text())
    values["train"].pop("model", None)
    values["train"]["init_from"] = str(directory)
    job_file.write_text(yaml.safe_dump(values))

    first = evermesh("launch", job_file, "--set", "train.stop_at=2")
    assert first.returncode == 0, first.stderr
    run = Run.open(job_file.parent / "runs" / "small")
    assert f"from {directory}, in float32" in run.events.read_text()
    shutil.rmtree(directory)
    second = evermesh("resume", run.directory)
    assert second.returncode == 0, second.stderr

    exported = evermesh("export", run.directory, tmp_path / "out", "--dtype", "bfloat16")
    assert exported.returncode == 0, exported.stderr
    assert f"{tmp_path / 'out'}: qwen3, " in exported.stdout
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.max_position_embeddings == 1024
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("def f(x):")["input_ids"]
    again = evermesh("export", run.directory, tmp_path / "out")
    assert again.returncode == 2
    assert "it is there already and not empty. Name a new directory" in again.stderr


def test_a_job_chooses_how_experts_are_balanced_and_nothing_else_of_them(tmp_path: Path) -> None:
    directory = _directory(tmp_path, **MIXTRAL, architectures=["MixtralForCausalLM"], head_dim=None)
    model = load_job(_job(tmp_path, directory, moe={"balancing": {"kind": "document_loss"}})).train.model
    assert model.moe is not None
    assert (model.moe.experts, model.moe.top_k, model.moe.ffn) == (4, 2, 48)
    assert model.moe.balancing.kind == "document_loss"
    with pytest.raises(
        JobFileInvalid, match=r"job\.yaml:\d+: train\.model\.moe\.top_k is 3, but .*model has 2\. Leave it out"
    ):
        load_job(_job(tmp_path, directory, moe={"top_k": 3}))


def test_a_job_shares_the_experts_of_a_mixtral_and_exports_them(job_file: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers: pip install 'evermesh[hf]'")
    import torch

    directory = tmp_path / "model"
    settings = transformers.AutoConfig.for_model(**MIXTRAL)
    before = transformers.AutoModelForCausalLM.from_config(settings)
    before.save_pretrained(directory)
    values = yaml.safe_load(job_file.read_text())
    values["train"] |= {"init_from": str(directory), "model": {"moe": {"balancing": {"kind": "document_loss"}}}}
    values["train"]["layout"]["ep"] = 2
    job_file.write_text(yaml.safe_dump(values))

    launched = evermesh("launch", job_file, "--set", "train.stop_at=2")
    assert launched.returncode == 0, launched.stderr
    run = Run.open(job_file.parent / "runs" / "small")
    assert f"router_aux_loss_coef 0.02 of {directory} is not used" in run.events.read_text()
    exported = evermesh("export", run.directory, tmp_path / "out")
    assert exported.returncode == 0, exported.stderr
    assert f"{tmp_path / 'out'}: mixtral, " in exported.stdout
    after, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    trained = dict(after.named_parameters())
    for name, parameter in before.named_parameters():
        assert parameter.shape == trained[name].shape
        assert not torch.equal(parameter, trained[name]), f"{name} was not trained"


def test_an_export_of_no_run_says_which_there_are(tmp_path: Path) -> None:
    found = evermesh("export", "nothing", tmp_path / "out", "--runs", tmp_path)
    assert found.returncode == 2
    assert "there is no run nothing" in found.stderr
