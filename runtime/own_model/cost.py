"""What a micro-batch of a model of transformers costs, from its parameters; for the planner."""

from typing import Any

from torch import nn

from evermesh.parallelism.cost import ModelShape


def model_shape(model: nn.Module, config: Any) -> ModelShape:
    """Sizes with the FLOPs of ``model``: ``ffn`` is the width of a gated block that costs what its matrices do.

    Of a mixture of experts all experts count, as if every token passed through them: what matters to the planner is how
    tokens compare with pairs, and a measured ``CostModel`` says it better.

    Args:
        model: whole.
        config: of its text part.
    """
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    embeddings = {id(part.weight) for part in (_embedding(model), _head(model)) if part is not None}
    matrices = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings)
    attention = layers * head_dim * (2 * heads + 2 * kv_heads) * hidden
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=max(1, round((matrices - attention) / (3 * hidden * layers))),
        vocabulary=config.vocab_size,
    )


def _embedding(model: nn.Module) -> Any:
    return model.get_input_embeddings()  # type: ignore[operator]


def _head(model: nn.Module) -> Any:
    return model.get_output_embeddings()  # type: ignore[operator]
