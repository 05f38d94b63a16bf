"""Tiny models of every family, made and run by transformers, which is the oracle; and ours beside them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evermesh.checkpoint.huggingface import read_weights
from evermesh.checkpoint.regions import Box
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.model.families import naming_of, read_model
from tests.oracle import plain_attention

VOCABULARY = 61
TOKENS = torch.randint(VOCABULARY, (83,), generator=torch.Generator().manual_seed(5))
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: dict[str, dict[str, Any]] = {
    "llama 3 with its rope": {"model_type": "llama", "rope_parameters": _LLAMA3_ROPE, "rms_norm_eps": 1e-5},
    "llama with tied embeddings and linear rope": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    },
    "llama with yarn and its own head size": {
        "model_type": "llama",
        "head_dim": 24,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral with a window": {"model_type": "mistral", "sliding_window": 13},
    "qwen2 with biases": {"model_type": "qwen2"},
    "qwen2 with windows in its last layers": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3 with windows in some layers": {
        "model_type": "qwen3",
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mixtral with a window": {"model_type": "mixtral", "num_local_experts": 6, "sliding_window": 13},
    "qwen3 with experts": {"model_type": "qwen3_moe", **_EXPERTS, "norm_topk_prob": True},
    "qwen3 with experts above a dense layer": {
        "model_type": "qwen3_moe",
        **_EXPERTS,
        "head_dim": 16,
        "mlp_only_layers": [0],
    },
    "qwen2 with experts and a shared one": {
        "model_type": "qwen2_moe",
        **_EXPERTS,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": False,
    },
    "qwen2 with experts in every second layer and no bias": {
        "model_type": "qwen2_moe",
        **_EXPERTS,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
        "qkv_bias": False,
    },
    "dots1 with groups, biases of routers, and windows": {
        "model_type": "dots1",
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "n_group": 3,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "sliding_window": 13,
        "max_window_layers": 1,
    },
}


def make(settings: dict[str, Any], directory: Path, dtype: torch.dtype = torch.float32, **saving: Any) -> Tensor:
    """Write a random model with transformers; returns its logits of ``TOKENS``."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**(_SIZES | settings))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".bias")):  # ones and zeros would hide a missing or exchanged one
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model = model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = torch.empty(len(buffer)).uniform_(-0.3, 0.3)
    model.save_pretrained(directory, **saving)
    return _logits(model)


def logits_of_transformers(directory: Path) -> Tensor:
    """Logits of ``TOKENS`` by transformers, which loads the directory without complaint."""
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return _logits(model.eval().float())


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS.unsqueeze(0), use_cache=False).logits.squeeze(0)


def ours(directory: Path) -> Decoder:
    """Our model of a Hugging Face directory, on one device, in float32."""
    config = read_model(directory)
    model = Decoder(config, config.rows(VOCABULARY))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    naming = naming_of(directory, {name: parameter.shape for name, parameter in parameters.items()})
    whole = {name: [(Box((0,) * p.dim(), tuple(p.shape)), p)] for name, p in parameters.items()}
    biases = {name: torch.empty(shape) for name, shape in naming.shapes.items() if name.endswith("router.bias")}
    read_weights(directory, naming, whole | {name: [(Box((0,), tuple(b.shape)), b)] for name, b in biases.items()})
    for name, bias in biases.items():
        model.get_submodule(name.removesuffix(".bias")).bias_E = bias.double()
    return model


def our_logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, torch.arange(len(TOKENS)), plain_attention)


def edited(directory: Path, **changes: Any) -> Path:
    """Change settings of a config.json; a value of None removes one."""
    file = directory / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return directory
