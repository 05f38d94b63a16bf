"""Model families against transformers: the same logits, the same settings, and nothing passed over in silence."""

from pathlib import Path
from typing import Any

import pytest

from evermesh.runtime.errors import UnsupportedModel
from evermesh.runtime.model.config import DocumentLossBalancing, ModelConfig, MoeConfig, NoBalancing
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.model.families import (
    FAMILIES,
    Family,
    differences,
    naming_of,
    read_model,
    unused_settings,
    written_form,
)
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
    assert _read_back(family, model, tmp_path / "again") == model
    assert differences(model, tmp_path / "again") == []


def _read_back(family: Family, model: ModelConfig, directory: Path) -> ModelConfig:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    edited(directory, **family.settings(model, vocabulary=VOCABULARY, max_positions=128, dtype="float32"))
    return read_model(directory)


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


_MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "dots1")
_MIXTURES = [name for name, settings in MODELS.items() if settings["model_type"] in _MOE]
_OF_EXPERTS: dict[str, dict[str, Any]] = {
    "shared_ffn": {"shared_ffn": 48},
    "shared_gate": {"shared_ffn": 48, "shared_gate": True},
    "router": {"router": "sigmoid"},
    "groups": {"groups": 2},
    "top_groups": {"groups": 2, "top_groups": 2},
    "normalise_weights": {"normalise_weights": False},
    "scale": {"scale": 2.5},
    "first_dense_layers": {"first_dense_layers": 1},
    "period": {"period": 2},
    "balancing: bias": {"balancing": {"kind": "bias"}},
    "capacity_factor": {"capacity_factor": 1.5},
}
"""Every option of experts."""


def test_every_option_of_experts_is_tried_below() -> None:
    sizes = {"experts", "top_k", "ffn"}
    assert {name.split(":")[0] for name in _OF_EXPERTS} == MoeConfig.model_fields.keys() - sizes


@pytest.mark.parametrize("option", _OF_EXPERTS)
@pytest.mark.parametrize("name", _MIXTURES)
def test_an_option_of_experts_is_written_or_refused_by_name(name: str, option: str, tmp_path: Path) -> None:
    make(MODELS[name], tmp_path)
    before = read_model(tmp_path)
    assert before.moe is not None
    moe = MoeConfig.model_validate(before.moe.model_dump() | _OF_EXPERTS[option])
    model = before.model_copy(update={"moe": moe})
    family = FAMILIES[MODELS[name]["model_type"]]
    reasons = family.misfits(model)
    if f"moe.{option}" in family.always | family.may:
        assert [reason for reason in reasons if option in reason] == []
    elif moe != before.moe:
        assert f"it has no moe.{option}" in reasons
        with pytest.raises(UnsupportedModel, match=rf"{family.model_type}: [^;]*it has no moe\.{option}"):
            _write(model)
    if not reasons:
        again = _read_back(family, model, tmp_path / "again")
        assert [again.has_experts(layer) for layer in range(3)] == [model.has_experts(layer) for layer in range(3)]
        # several places may say the same, and how biases move is no setting of theirs
        other = {"first_dense_layers": 0, "period": 1, "balancing": NoBalancing()}
        assert again.moe is not None
        assert again.moe.model_copy(update=other) == moe.model_copy(update=other)


def _write(model: ModelConfig) -> None:
    shapes = {name: tuple(p.shape) for name, p in Decoder(model, VOCABULARY).named_parameters()}
    family, _ = written_form(model, shapes)
    pytest.fail(f"written as {family.model_type}")


def test_layers_with_experts_that_have_no_rhythm_are_refused(tmp_path: Path) -> None:
    make(MODELS["qwen3 with experts above a dense layer"] | {"mlp_only_layers": [1]}, tmp_path)
    with pytest.raises(UnsupportedModel, match=r"mlp_only_layers is \[1\], but with it layers \[0, 2\] have experts"):
        read_model(tmp_path)


def test_a_loss_that_balances_is_reported_and_mapped_to_nothing(tmp_path: Path) -> None:
    make(MODELS["mixtral with a window"] | {"router_aux_loss_coef": 0.02}, tmp_path)
    model = read_model(tmp_path)
    assert unused_settings(tmp_path) == {"router_aux_loss_coef": 0.02}
    assert model.moe is not None
    assert model.moe.balancing == NoBalancing()
    balanced = model.moe.model_copy(update={"balancing": DocumentLossBalancing()})
    trained = model.model_copy(update={"moe": balanced})
    assert differences(trained, tmp_path) == [], "how experts are balanced is a choice of the job"
    family, _ = written_form(trained, {})
    settings = family.settings(trained, vocabulary=VOCABULARY, max_positions=128, dtype="float32")
    assert settings["router_aux_loss_coef"] == 0.0


def test_experts_that_differ_from_those_of_the_directory_are_named(tmp_path: Path) -> None:
    make(MODELS["mixtral with a window"], tmp_path)
    model = read_model(tmp_path)
    assert model.moe is not None
    other = model.model_copy(update={"moe": model.moe.model_copy(update={"top_k": 3})})
    assert differences(other, tmp_path) == ["moe.top_k is 3, there it is 2"]
    assert differences(model.model_copy(update={"moe": None}), tmp_path) == ["moe.experts is None, there it is 6"]
