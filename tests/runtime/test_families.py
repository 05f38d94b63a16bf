"""Model families against transformers: the same logits, the same settings, and nothing passed over in silence."""

from pathlib import Path
from typing import Any

import pytest
import torch

from evermesh.runtime.errors import UnsupportedModel
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.model.families import FAMILIES, differences, naming_of, read_model, written_form
from tests.runtime.hugging_face import MODELS, VOCABULARY, edited, make, our_logits, ours

pytest.importorskip("transformers", reason="the oracle is transformers: pip install 'evermesh[hf]'")


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    expected = make(MODELS[name], tmp_path)
    error = (our_logits(ours(tmp_path)) - expected).abs().max()
    assert expected.abs().max() > 0.5, "logits that an error would show in"
    assert error <= 1e-4, error


@pytest.mark.parametrize("name", MODELS)
def test_settings_come_back_as_the_same_model(name: str, tmp_path: Path) -> None:
    make(MODELS[name], tmp_path)
    model = read_model(tmp_path)
    shapes = {name: tuple(p.shape) for name, p in Decoder(model, VOCABULARY).named_parameters()}
    family, naming = written_form(model, shapes)
    assert naming.parts == naming_of(tmp_path, shapes).parts
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.json").write_text("{}")
    edited(again, **family.settings(model, vocabulary=VOCABULARY, max_positions=128, dtype="float32"))
    assert read_model(again) == model
    assert differences(model, again) == []


def test_settings_in_the_form_of_transformers_4_mean_the_same(tmp_path: Path) -> None:
    make(MODELS["llama 3 with its rope"], tmp_path)
    model = read_model(tmp_path)
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    edited(tmp_path, rope_parameters=None, rope_scaling=rope, rope_theta=500_000.0, dtype=None, torch_dtype="float32")
    assert read_model(tmp_path) == model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', which this version does not know"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but only 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"attention_dropout": 0.1}, r"attention_dropout is 0\.1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "does not know: quantization_config"),
        ({"final_logit_softcapping": 30.0}, "does not know: final_logit_softcapping"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_parameters is .*only linear, llama3, yarn",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "does not know its mscale"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "only whole heads"),
        ({"rms_norm_eps": None}, "has no rms_norm_eps"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types is"),
        ({"num_attention_heads": 3, "head_dim": None}, "hidden 32 is not a multiple of heads 3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make({"model_type": "llama"}, tmp_path)
    with pytest.raises(UnsupportedModel, match=message):
        read_model(edited(tmp_path, **changes))


def test_a_model_that_no_family_can_say_is_not_exported() -> None:
    model = ModelConfig(parallel_block=True)
    with pytest.raises(UnsupportedModel, match="no Hugging Face family has parallel_block"):
        written_form(model, {})


_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
_MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": _EXPERTS,
    "qwen3_moe": {**_EXPERTS, "moe_intermediate_size": 24, "head_dim": 16},
}


@pytest.mark.parametrize("model_type", _MIXTURES)
def test_experts_are_found_one_by_one_and_stacked(model_type: str, tmp_path: Path) -> None:
    from evermesh.checkpoint.huggingface import read_weights, tensors_in
    from evermesh.checkpoint.regions import Box

    settings = _MIXTURES[model_type]
    make({"model_type": model_type, **settings}, tmp_path)
    dense = ModelConfig(hidden=32, layers=3, heads=4, kv_heads=2, ffn=48, head_dim=settings.get("head_dim"))
    dense = dense.model_copy(update={"qk_norm": model_type == "qwen3_moe"})
    shapes = {name: tuple(p.shape) for name, p in Decoder(dense, VOCABULARY).named_parameters()}
    shapes = {name: shape for name, shape in shapes.items() if "feed_forward." not in name}
    width = settings.get("moe_intermediate_size", 48)
    for layer in range(3):
        shapes[f"blocks.{layer}.mixture.router.weight"] = (3, 32)
        for name, shape in {"gate": (width, 32), "up": (width, 32), "down": (32, width)}.items():
            shapes[f"blocks.{layer}.mixture.experts.{name}"] = (3, *shape)
    naming = naming_of(tmp_path, shapes)
    stored = tensors_in(tmp_path)
    assert naming.foreign_shapes == {name: tensor.shape for name, tensor in stored.items()}

    name, region = "blocks.1.mixture.experts.down", Box((1, 0, 0), (2, 32, width))
    tensor = torch.empty(region.sizes)
    read = read_weights(tmp_path, naming, {name: [(region, tensor)]})
    assert read.bytes_read == tensor.nbytes
    from safetensors import safe_open

    pattern = FAMILIES[model_type].names["blocks.{layer}.mixture.experts.down"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for row, expert in enumerate((1, 2)):
            assert torch.equal(tensor[row], file.get_tensor(pattern.format(layer=1, expert=expert)))


@pytest.mark.parametrize("model_type", _MIXTURES)
def test_settings_of_experts_are_read_and_written(model_type: str, tmp_path: Path) -> None:
    from evermesh.runtime.model.families.settings import Settings

    make({"model_type": model_type, **_MIXTURES[model_type]}, tmp_path)
    import json

    values = json.loads((tmp_path / "config.json").read_text())
    model = FAMILIES[model_type].model(Settings(values, "config.json"))
    assert (model["moe"]["experts"], model["moe"]["top_k"]) == (3, 2)
    assert model["moe"]["ffn"] == _MIXTURES[model_type].get("moe_intermediate_size", 48)
    if "moe" not in ModelConfig.model_fields:
        with pytest.raises(UnsupportedModel, match="whose experts this version cannot train"):
            read_model(tmp_path)
