"""Runs that start from Hugging Face directories, and directories that are made from runs."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from evermesh import checkpoint
from evermesh.checkpoint.errors import WeightsUnusable
from evermesh.parallelism import Layout
from evermesh.runtime import TrainConfig, process_group
from evermesh.runtime.errors import OtherRun, UnsupportedModel, VocabularyTooSmall
from evermesh.runtime.lamb import build_optimizer
from evermesh.runtime.model.building import build_model
from evermesh.runtime.model.experts import mixtures_of
from evermesh.runtime.model.families import read_model
from evermesh.runtime.optimizer import shard_map
from evermesh.runtime.trainer import Trainer
from evermesh.runtime.weights import ExportOptions, export_checkpoint, load_initial_weights
from tests.cluster import run_ranks
from tests.runtime.hugging_face import MODELS, edited, logits_of_transformers, make, our_logits, ours

pytest.importorskip("transformers", reason="the oracle is transformers: pip install 'evermesh[hf]'")

OPTIONS = ExportOptions(max_positions=128)
EVEN = {"num_attention_heads": 8, "num_key_value_heads": 4}
"""Heads that four ranks can share."""
DOTS1 = "dots1 with groups, biases of routers, and windows"
EXPERTS = (
    "mixtral with a window",
    "qwen2 with experts and a shared one",
    "qwen3 with experts above a dense layer",
    DOTS1,
)


def _ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Real ranks, or for one of them this process."""
    return [function(0, 1, *arguments)] if world_size == 1 else run_ranks(world_size, function, *arguments)


def _config(corpus: Path, directory: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": read_model(directory).model_dump(),
        "init_from": str(directory),
        "data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 64, "batch_tokens": 300},
        "layout": {"capacity": 128},
        "steps": 2,
    }
    return TrainConfig.model_validate(values | changes)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Qwen3 with windows, biggest of the options; its rows suffice for the tokenizer of the corpus and are more."""
    settings = MODELS["qwen3 with windows in some layers"] | EVEN
    make(settings | {"vocab_size": 413}, tmp_path / "model", torch.bfloat16)
    return tmp_path / "model"


class Loaded(NamedTuple):
    """What loading did on a rank."""

    bytes_read: int
    bytes_needed: int
    """Of what the rank owns in the optimizer, and of the biases of routers."""
    copied: Counter[str]
    """How many elements of every parameter the rank owns."""


def _loaded(rank: int, workers: int, directory: Path, layout: Layout) -> Loaded:
    """Load on one of the ranks of ``layout``, and compare all that it holds with the load of one process."""
    model_config = read_model(directory)
    train = TrainConfig.model_validate(
        {"model": model_config, "layout": layout, "data": {"sources": [{"kind": "stdlib"}]}}
    )
    groups = process_group.communicators(
        60.0, layout, experts=model_config.moe is not None, tied=model_config.tied_embeddings
    )
    built = build_model(train, model_config.rows(0), groups, torch.device("cpu"))
    optimizer = build_optimizer(built.sets, train.optimizer, built.tied)
    shards = shard_map([of for of_rank in built.held for of in of_rank], torch.float32)
    read, router_biases = load_initial_weights(directory, model_config, optimizer, shards, groups.world)
    assert read.dtypes == (("bfloat16", "float32") if router_biases else ("bfloat16",))
    whole = ours(directory).state_dict()
    if router_biases:
        assert router_biases == [whole[name].tolist() for name in whole if name.endswith("bias_E")]
    held = {name: parameter.detach().clone() for name, parameter in built.model.named_parameters()}
    for parameters in built.sets:
        for entry in parameters.flat.entries:
            part = whole[entry.name]
            offsets, sizes = (
                entry.cut.offsets(parameters.sharers.number),
                entry.cut.local_shape(parameters.sharers.number),
            )
            for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
                part = part.narrow(dim, start, size)
            assert torch.equal(held.pop(entry.name), part), entry.name
    for name, copy in held.items():  # of the embedding, in the last stage
        assert name == "head.weight"
        assert torch.equal(copy, whole["embedding.weight"])
    owned: Counter[str] = Counter()
    for name, tensors in optimizer.owned_state().items():
        if name.startswith("parameter."):
            owned[name.removeprefix("parameter.")] += sum(tensor.numel() for tensor in tensors)
    return Loaded(read.bytes_read, 2 * owned.total() + 4 * sum(map(len, router_biases)), owned)


def _check_bytes(results: list[Loaded], directory: Path, sharers: int = 1) -> None:
    """Every rank read what it owns and no more; all of them together every weight once.

    Norms are read once per sharer, and biases of routers by every rank.
    """
    for loaded in results:
        assert loaded.bytes_needed <= loaded.bytes_read <= 1.05 * loaded.bytes_needed
    stored = load_file(directory / "model.safetensors")
    in_files = sum(t.nbytes for t in stored.values())
    norms = sum(t.nbytes for n, t in stored.items() if "norm" in n)
    biases = sum(t.nbytes for n, t in stored.items() if n.endswith("e_score_correction_bias"))
    everywhere = (sharers - 1) * norms + (len(results) - 1) * biases
    assert sum(loaded.bytes_read for loaded in results) == in_files + everywhere


@pytest.mark.parametrize(("hdp", "tp"), [(1, 1), pytest.param(3, 1, marks=pytest.mark.parity), (2, 2)])
def test_every_rank_reads_the_bytes_of_its_own_regions_and_holds_its_part(directory: Path, hdp: int, tp: int) -> None:
    results = _ranks(hdp * tp, _loaded, directory, Layout(hdp=hdp, tp=tp))
    _check_bytes(results, directory, sharers=tp)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("mixtral with a window", Layout(hdp=4, ep=2, etp=2)),
        ("mixtral with a window", Layout(pp=2, hdp=2, ep=2)),
        (DOTS1, Layout(pp=2, hdp=2, ep=2)),
        pytest.param("qwen2 with experts and a shared one", Layout(pp=2, hdp=2, ep=2), marks=pytest.mark.parity),
        pytest.param("qwen3 with experts above a dense layer", Layout(hdp=4, ep=2, etp=2), marks=pytest.mark.parity),
    ],
    ids=lambda value: value if isinstance(value, str) else f"pp{value.pp} ep{value.ep} etp{value.etp}",
)
def test_every_rank_reads_only_its_own_boxes_of_stacked_experts(model: str, layout: Layout, tmp_path: Path) -> None:
    make(MODELS[model] | {"tie_word_embeddings": layout.pp > 1}, tmp_path, torch.bfloat16)
    results = _ranks(4, _loaded, tmp_path, layout)
    _check_bytes(results, tmp_path)
    name = "blocks.1.mixture.experts.down"
    stack = dict(ours(tmp_path).named_parameters())[name]
    assert sum(loaded.copied[name] for loaded in results) == stack.numel()
    holders = [loaded.copied[name] for loaded in results if loaded.copied[name]]
    assert len(holders) == 4 // layout.pp, "the ranks of a stage share its experts"
    assert set(holders) == {stack.numel() * layout.pp // 4}


def _fit(rank: int, workers: int, config: TrainConfig, directory: Path, steps: int) -> int:
    trainer = Trainer(config, directory=directory)
    if steps == 0:
        trainer.save()
        return 0
    return trainer.fit().step


def _run(config: TrainConfig, directory: Path, steps: int) -> Path:
    """The checkpoint of a run; without steps that of its initial weights."""
    directory.mkdir()
    _ranks(config.layout.world_size, _fit, config, directory, steps)
    newest = checkpoint.latest(directory / "checkpoints")
    assert newest is not None
    return newest


@pytest.mark.parametrize(
    "model",
    [
        "qwen3 with windows in some layers",
        EXPERTS[0],
        DOTS1,
        *(pytest.param(model, marks=pytest.mark.parity) for model in EXPERTS[1:-1]),
    ],
)
def test_weights_that_go_in_come_out_bit_for_bit(model: str, corpus: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    make(MODELS[model] | {"vocab_size": 413}, directory, torch.bfloat16)
    config = _config(corpus, directory, layout={"capacity": 128, "hdp": 2, "ep": 2 if model in EXPERTS else 1})
    path = _run(config, tmp_path / "run", steps=0)
    written = export_checkpoint(path, tmp_path / "out", ExportOptions(dtype="bfloat16", most_file_bytes=40_000))
    before = load_file(directory / "model.safetensors")
    after = {n: t for file in written.weights.files for n, t in load_file(tmp_path / "out" / file).items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_model(tmp_path / "out") == read_model(directory)


def test_files_are_as_small_as_asked_and_the_index_names_every_tensor(
    corpus: Path, directory: Path, tmp_path: Path
) -> None:
    path = _run(_config(corpus, directory), tmp_path / "run", steps=0)
    written = export_checkpoint(path, tmp_path / "out", ExportOptions(most_file_bytes=40_000))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(written.weights.files) > 3
    assert set(index["weight_map"].values()) == set(written.weights.files)
    sizes: Counter[str] = Counter()
    for name, file in index["weight_map"].items():
        sizes[file] += load_file(tmp_path / "out" / file)[name].nbytes
    assert sizes.total() == index["metadata"]["total_size"] == written.weights.num_bytes
    largest = 413 * 32 * 4  # embedding and head: they have files of their own
    assert all(size <= 40_000 or size == largest for size in sizes.values())


@pytest.mark.parametrize("name", ["llama 3 with its rope", "mistral with a window", "qwen2 with biases", *EXPERTS])
def test_a_trained_model_has_the_same_logits_in_transformers(name: str, corpus: Path, tmp_path: Path) -> None:
    make(MODELS[name] | {"vocab_size": 413}, tmp_path / "model")
    path = _run(_config(corpus, tmp_path / "model"), tmp_path / "run", steps=2)
    export_checkpoint(path, tmp_path / "out", ExportOptions(most_file_bytes=60_000))
    expected = our_logits(ours(tmp_path / "out"))
    start = our_logits(ours(tmp_path / "model"))
    assert (expected - start).abs().max() > 1e-2, "nothing was trained"
    assert (logits_of_transformers(tmp_path / "out") - expected).abs().max() <= 1e-4


def test_biases_of_routers_come_with_the_weights_and_stay_where_nothing_moves_them(
    corpus: Path, tmp_path: Path
) -> None:
    make(MODELS[DOTS1] | {"vocab_size": 413}, tmp_path / "model")
    config = _config(corpus, tmp_path / "model")
    expected = [mixture.router.bias_E for mixture in mixtures_of(ours(tmp_path / "model"))]
    assert len(expected) == 2
    assert all(0.05 < bias_E.abs().max() < 0.3 for bias_E in expected)
    trainer = Trainer(config, directory=tmp_path)
    trainer.fit()
    for run in (trainer, Trainer(config, directory=tmp_path, resume=True)):
        held = [mixture.router.bias_E for mixture in mixtures_of(run.built.model)]
        assert all(map(torch.equal, held, expected))


def test_biases_of_routers_that_a_run_moved_are_exported(corpus: Path, tmp_path: Path) -> None:
    make(MODELS[DOTS1] | {"vocab_size": 413}, tmp_path / "model", torch.bfloat16)
    model = read_model(tmp_path / "model").model_dump()
    model["moe"]["balancing"] = {"kind": "bias", "rate": 0.125}
    path = _run(_config(corpus, tmp_path / "model", model=model), tmp_path / "run", steps=2)
    export_checkpoint(path, tmp_path / "out", ExportOptions(dtype="bfloat16"))
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("model", "out"))
    names = [name for name in before if name.endswith("e_score_correction_bias")]
    assert len(names) == 2
    for name in names:
        assert after[name].dtype == torch.float32, "whatever the type of the weights"
        steps = (after[name] - before[name]) / 0.125
        assert set(steps.round(decimals=4).abs().tolist()) <= {0.0, 1.0, 2.0}
        assert steps.abs().max() >= 1.0
    assert (logits_of_transformers(tmp_path / "out") - our_logits(ours(tmp_path / "out"))).abs().max() <= 1e-4


def test_a_run_from_scratch_is_exported_with_its_tokenizer(corpus: Path, tmp_path: Path) -> None:
    import tokenizers
    import transformers

    values = {"model": {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48, "tied_embeddings": True}}
    (tmp_path / "empty").mkdir()
    config = TrainConfig.model_validate(
        values
        | {"data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 64, "batch_tokens": 300}}
        | {"layout": {"capacity": 128}, "steps": 2, "dtype": "bfloat16"}
    )
    path = _run(config, tmp_path / "run", steps=2)
    options = ExportOptions(trained_context=64, tokenizer=corpus / "tokenizer.json", end_token=3)
    written = export_checkpoint(path, tmp_path / "empty", options)
    assert (written.model_type, written.dtype) == ("llama", "bfloat16")
    assert not (tmp_path / ".exporting-empty").exists()
    assert (logits_of_transformers(tmp_path / "empty") - our_logits(ours(tmp_path / "empty"))).abs().max() <= 1e-4
    text = "abc de fgh"
    ids = tokenizers.Tokenizer.from_file(str(corpus / "tokenizer.json")).encode(text).ids
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "empty")
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids


def test_the_files_of_transformers_in_several_parts_are_read(tmp_path: Path) -> None:
    expected = make(MODELS["llama 3 with its rope"], tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert (our_logits(ours(tmp_path)) - expected).abs().max() <= 1e-4


def test_a_tied_checkpoint_may_repeat_the_head_and_the_rope(tmp_path: Path) -> None:
    expected = make(MODELS["qwen3"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    assert (our_logits(ours(tmp_path)) - expected).abs().max() <= 1e-4


def _without(directory: Path, name: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    save_file(tensors, directory / "model.safetensors")


def _with(directory: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(directory / "model.safetensors") | {name: tensor}, directory / "model.safetensors")


def _truncated(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_pickled, r"weights are pickles \(pytorch_model\.bin\).*save_pretrained"),
        (_truncated, r"takes .* bytes, but is said to be in bytes .*Fetch the file again"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 40), "its header says"),
        (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda d: _without(d, "model.norm.weight"), r"model\.norm\.weight \[32\] is missing"),
        (lambda d: _with(d, "model.extra", torch.ones(2)), r"model\.extra \[2\] is no part of the model"),
        (lambda d: _with(d, "model.norm.weight", torch.ones(31)), r"is \[31\], the model has \[32\]"),
        (
            lambda d: _with(d, "model.norm.weight", torch.ones(32, dtype=torch.int8)),
            "of type int8, which is not one of",
        ),
    ],
)
def test_files_that_are_not_the_weights_of_the_model_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    make({"model_type": "llama"}, tmp_path)
    damage(tmp_path)
    with pytest.raises(WeightsUnusable, match=message):
        ours(tmp_path)


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    make({"model_type": "llama"}, tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(WeightsUnusable, match="not in its directory"):
        ours(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_numbers(corpus: Path, tmp_path: Path) -> None:
    make(MODELS["qwen3"], tmp_path / "model")
    with pytest.raises(VocabularyTooSmall, match="has 400 entries, but the model only 61 rows"):
        Trainer(_config(corpus, tmp_path / "model"))


def test_another_model_than_that_of_the_directory_is_refused(corpus: Path, directory: Path) -> None:
    config = _config(corpus, directory)
    model = config.model.model_copy(update={"norm_eps": 1e-3, "sliding_window": 8})
    with pytest.raises(UnsupportedModel, match=r"another model: norm_eps is 0\.001, there it is 1e-06\. "):
        Trainer(config.model_copy(update={"model": model}))


def test_a_directory_that_is_not_empty_is_not_overwritten(corpus: Path, directory: Path, tmp_path: Path) -> None:
    path = _run(_config(corpus, directory), tmp_path / "run", steps=0)
    with pytest.raises(WeightsUnusable, match="already and not empty"):
        export_checkpoint(path, directory, OPTIONS)
    edited(directory, max_position_embeddings=None)
    assert read_model(directory).max_positions is None


def test_checkpoints_of_before_these_options_are_resumed(corpus: Path, tmp_path: Path) -> None:
    from evermesh.checkpoint.directory import read_manifest

    old = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48}
    config = TrainConfig.model_validate(
        {"model": old, "data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 64}}
        | {"layout": {"capacity": 128}, "steps": 2, "stop_at": 1}
    )
    trainer = Trainer(config, directory=tmp_path)
    known = {*old, "rope_theta", "norm_eps", "initial_std"}
    identity = trainer.state.identity
    trainer.state.identity = identity | {"model": {k: v for k, v in identity["model"].items() if k in known}}
    path = trainer.save()
    assert path is not None
    model = read_manifest(path).description["model"]
    assert isinstance(model, dict)
    assert model.keys() == known
    Trainer(config, directory=tmp_path, resume=True)
    other = config.model_copy(update={"model": config.model.model_copy(update={"qk_norm": True})})
    with pytest.raises(OtherRun, match="is a checkpoint of another run: model was"):
        Trainer(other, directory=tmp_path, resume=True)
