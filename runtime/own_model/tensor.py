"""Tensor parallelism from the plan that a model of transformers declares (``base_model_tp_plan``, ``_tp_plan``).

Every rank of the group sees all tokens of the micro-batch. A *column* layer gives its part of the outputs, a *row* layer
takes them and its outputs are summed (Shoeybi et al., Megatron-LM, arXiv 1909.08053). Parameters that are cut are DTensors,
so that sharded data parallelism and optimizers know which part a rank holds; the layers compute with local tensors and
communicate through the tap.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.tensor.sharding import Cut, TensorSharding
from evermesh.parallelism.tensor.sums import sum_backward, sum_forward
from evermesh.runtime.errors import UnsupportedModel

Rule = Literal["column", "row", "partial", "whole"]
"""What the ranks do with a module.

- ``column``, ``row``: each has its part of the outputs, or of the inputs;
- ``partial``: each holds all and uses it for its own heads, so gradients are summed;
- ``whole``: all do the same.
"""
_RULES: dict[str, Rule] = {
    "colwise": "column",
    "rowwise": "row",
    "colwise_gather_output": "column",  # of the output layer alone: the loss needs no whole logits
    "replicated_with_grad_allreduce": "partial",
    "embedding_rowwise": "whole",
    "embedding_colwise": "whole",
}
_EQUAL_PARTS = TensorSharding({}, {}, ("num_attention_heads", "num_key_value_heads", "intermediate_size"))


class TensorParallelModel:
    """How a model is shared by the ranks of ``tp``; every rank makes one from the same whole model, in place.

    Args:
        model: whole, the same on all ranks.
        config: of its text part.
        tp: the ranks.
        mesh: the axis of ``tp`` alone; None where it is one rank.

    Raises:
        LayoutDoesNotFit: the degree does not divide heads or widths; names the degrees that do.
        UnsupportedModel: the model declares no plan, or one with a style that is not known here.
    """

    def __init__(self, model: nn.Module, config: Any, tp: Communicator, mesh: DeviceMesh | None) -> None:
        self.tp = tp
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        """Of the whole parameters."""
        self.dims: dict[str, int] = {}
        """The dim along which a parameter is cut."""
        self.partial: list[str] = []
        """Parameters that all ranks hold and whose gradients are summed over them."""
        self.vocabulary: int | None = None
        """Entries of the vocabulary, where the model returns the logits of this rank's part of them; None: of all."""
        self._inputs = _SharedInput(tp)
        if mesh is None:
            return
        rules = _rules(model)
        _check_degree(tp.size, config)
        for name, rule in rules.items():
            self._apply(model, name, rule, mesh)

    def cut(self, name: str) -> Cut:
        """What every rank of the group holds of a parameter."""
        return Cut(self.shapes[name], self.dims.get(name), self.tp.size)

    def end_micro_batch(self) -> None:
        """Let go of activations."""
        self._inputs.clear()

    def _apply(self, model: nn.Module, name: str, rule: Rule, mesh: DeviceMesh) -> None:
        module = model.get_submodule(name)
        if rule == "partial":
            self.partial += [f"{name}.{own}" for own, _ in module.named_parameters()]
            return
        is_head = module is model.get_output_embeddings()  # type: ignore[operator]
        if rule == "whole" or (is_head and not _can_share_head(model, module, self.tp.size)):
            return
        if not isinstance(module, nn.Linear):
            raise UnsupportedModel(
                f"the plan of {type(model).__name__} shares {name}, a {type(module).__name__}; linear layers can be "
                "shared here. Set layout.tp to 1."
            )
        for own, dim in (("weight", 0 if rule == "column" else 1), ("bias", 0 if rule == "column" else None)):
            parameter = getattr(module, own)
            if parameter is not None and dim is not None:
                self._share(module, own, parameter, dim, mesh)
                self.dims[f"{name}.{own}"] = dim
        forward = _column(module, self._inputs) if rule == "column" else _row(module, self.tp)
        module.forward = forward  # type: ignore[assignment, method-assign]
        if is_head:
            self.vocabulary = module.out_features

    def _share(self, module: nn.Module, own: str, parameter: nn.Parameter, dim: int, mesh: DeviceMesh) -> None:
        cut = Cut(tuple(parameter.shape), dim, self.tp.size)
        start, stop = cut.span(self.tp.rank)
        part = parameter.detach().narrow(dim, start, stop - start).to(_device(mesh))
        part = part.clone(memory_format=torch.contiguous_format)  # the whole one is let go of
        shared = DTensor.from_local(part, mesh, [Shard(dim)], run_check=False)
        setattr(module, own, nn.Parameter(shared, requires_grad=parameter.requires_grad))


def _device(mesh: DeviceMesh) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")


def _check_degree(ranks: int, config: Any) -> None:
    heads = config.num_attention_heads
    sizes = {"num_attention_heads": heads, "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads}
    sizes["intermediate_size"] = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    _EQUAL_PARTS.check_degree(ranks, sizes)


def _rules(model: nn.Module) -> dict[str, Rule]:
    """The rule of every module that the plan names.

    Raises:
        UnsupportedModel: there is no plan, or a style is unknown.
    """
    plan: Mapping[str, str] = dict(getattr(model, "_tp_plan", None) or {})
    head = model.get_output_embeddings()  # type: ignore[operator]
    rules: dict[str, Rule] = {}
    for name, module in model.named_modules():
        styles = [style for pattern, style in plan.items() if re.fullmatch(_expression(pattern), name)]
        for style in styles[:1]:
            if style not in _RULES or (style == "colwise_gather_output" and module is not head):
                raise _unknown_style(model, name, style)
            rules[name] = _RULES[style]
    named = {name for name, _ in model.named_parameters()}
    for pattern, style in plan.items():  # a parameter by itself, as of stacked experts
        for name in named:
            if re.fullmatch(_expression(pattern), name):
                raise _unknown_style(model, name, style)
    if not {"column", "row"} <= set(rules.values()):
        raise UnsupportedModel(
            f"{type(model).__name__} declares no plan for tensor parallelism (base_model_tp_plan of its configuration). Set "
            "layout.tp to 1 and give these ranks to layout.hdp."
        )
    return rules


def _unknown_style(model: nn.Module, name: str, style: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the plan of {type(model).__name__} shares {name} as {style!r}; known are {', '.join(_RULES)}, the third for the "
        "output layer only. Set layout.tp to 1 and give these ranks to layout.hdp."
    )


def _expression(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", "[^.]+")


def _can_share_head(model: Any, head: Any, ranks: int) -> bool:
    """Not when the embedding is the same parameter, which every rank needs whole."""
    is_tied: bool = model.get_input_embeddings().weight is head.weight
    return not is_tied and head.weight.shape[0] % ranks == 0


class _SharedInput:
    """Column layers that take one tensor, such as those of queries, keys and values, sum its gradient once, together."""

    def __init__(self, tp: Communicator) -> None:
        self.tp = tp
        self._last: tuple[Tensor, Tensor, bool] | None = None
        """The tensor, the same with a summed gradient, and whether there will be one."""

    def __call__(self, x_BTC: Tensor) -> Tensor:
        with_gradient = torch.is_grad_enabled()
        if self._last is None or self._last[0] is not x_BTC or self._last[2] != with_gradient:
            self._last = x_BTC, sum_backward(x_BTC, self.tp), with_gradient
        return self._last[1]

    def clear(self) -> None:
        """Let go of them."""
        self._last = None


def _column(module: nn.Linear, inputs: _SharedInput) -> Callable[[Tensor], Tensor]:
    def forward(x_BTC: Tensor) -> Tensor:
        return F.linear(inputs(x_BTC), _local(module.weight), _local(module.bias))

    return forward


def _row(module: nn.Linear, tp: Communicator) -> Callable[[Tensor], Tensor]:
    def forward(x_BTc: Tensor) -> Tensor:
        y_BTC = sum_forward(F.linear(x_BTc, _local(module.weight)), tp)
        return y_BTC if module.bias is None else y_BTC + module.bias  # once, behind the sum

    return forward


def _local(parameter: Any) -> Any:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
