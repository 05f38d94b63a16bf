"""Gathers the parameters of a module when it is about to compute, and sums its gradients when it has.

The modules of a model run one after the other; while one computes, the parameters of the next are on their way (the
prefetch of FSDP: Zhao et al., arXiv 2304.11277, section 3.3; MegaScale, arXiv 2402.15627, section 3.2). Where parameters stay
for a step, this only waits for what the start of the step began.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.model.stages import Part
from evermesh.runtime.parameter_set import ParameterSet


class Gathering:
    """What some modules that run one after the other need: there from the first to the last of them.

    Args:
        sets: their parameters.
        for_step: the parameters stay until the end of the step, and gradients add up until then.
        stays: they stay from the forward pass to the backward pass, which follows at once.
        in_backward: whether the backward pass needs the parameters.
    """

    def __init__(
        self, sets: Sequence[ParameterSet], *, for_step: bool, stays: bool = False, in_backward: bool = True
    ) -> None:
        self.sets, self.for_step, self.stays, self.needs_backward = tuple(sets), for_step, stays, in_backward
        self.earlier: Gathering | None = None
        self.later: Gathering | None = None
        self._in_backward = False

    def apply(self, first: nn.Module, last: nn.Module) -> None:
        """Around the modules from ``first`` to ``last``."""
        first.register_forward_pre_hook(self._before_forward)
        last.register_forward_hook(self._after_forward)

    def start(self) -> None:
        """Begin to gather. Collective over the owners that divide the parameters."""
        for parameters in self.sets:
            parameters.start_gather()

    def gather(self) -> None:
        """Return when everything is here. Collective as ``start`` is."""
        self.start()
        for parameters in self.sets:
            parameters.gather()

    def free(self) -> None:
        """Give memory back."""
        for parameters in self.sets:
            parameters.free()

    def _before_forward(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.gather()
        if self.for_step:
            return None
        if self.later is not None and not self._in_backward:
            self.later.start()
        x = arguments[0]
        return (_BehindBackward.apply(x, self), *arguments[1:]) if x.requires_grad else None

    def _after_forward(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.for_step:
            return None
        if not self._in_backward and not (self.stays and output.requires_grad):  # else a recomputation, in backward
            self.free()
        return _BeforeBackward.apply(output, self) if output.requires_grad and self.needs_backward else None

    def before_backward(self) -> None:
        """The backward pass of the last module begins."""
        self._in_backward = True
        self.gather()
        if self.earlier is not None and self.earlier.needs_backward:
            self.earlier.start()

    def behind_backward(self) -> None:
        """The backward pass of the first module has computed all gradients."""
        self._in_backward = False
        self.free()
        for parameters in self.sets:
            if not parameters.keeps_gradients and not parameters.reduces_itself:
                parameters.reduce()


class _BeforeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, gathering: Gathering) -> Tensor:
        ctx.gathering = gathering
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.gathering.before_backward()
        return grads[0], None


class _BehindBackward(torch.autograd.Function):
    # made before anything in the module, so the engine runs it behind everything that is ready there: all gradients
    @staticmethod
    def forward(ctx: Any, x: Tensor, gathering: Gathering) -> Tensor:
        ctx.gathering = gathering
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.gathering.behind_backward()
        return grads[0], None


def names_by_module(names: Sequence[str]) -> list[list[str]]:
    """The parameters of a decoder, by what is gathered together: embedding, every block, norm and head."""
    groups: dict[str, list[str]] = {}
    for name in names:
        head, _, rest = name.partition(".")
        key = f"{head}.{rest.partition('.')[0]}" if head == "blocks" else "embedding" if head == "embedding" else "head"
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def apply_gathering(model: Decoder, sets: Sequence[ParameterSet], parts: Mapping[int, Part], *, for_step: bool) -> None:
    """Let ``model`` gather its parameters, which are in ``sets`` by module, as it needs them.

    From then on forward and backward are collective over the owners that divide something; all of them run the same parts
    equally often, unless parameters stay for the step and are gathered before.
    """
    set_of = {name: parameters for parameters in sets for name in parameters.parameters}
    for part in parts.values():
        chain = list(_chain(model, part, set_of, for_step=for_step, alone=len(parts) == 1))
        for earlier, later in itertools.pairwise(chain):
            earlier.later, later.earlier = later, earlier


def _chain(
    model: Decoder, part: Part, set_of: Mapping[str, ParameterSet], *, for_step: bool, alone: bool
) -> Iterator[Gathering]:
    """The modules of a part in the order in which they run."""
    if part.is_first:
        embedding = set_of["embedding.weight"]
        gathering = Gathering([embedding], for_step=for_step, in_backward=False)
        gathering.apply(model.embedding, model.embedding)
        if not embedding.keeps_gradients:  # its input has no gradient, behind which its own would be complete
            embedding.reduces_itself = True
            weight = model.get_parameter("embedding.weight")
            weight.register_post_accumulate_grad_hook(lambda _: embedding.reduce())
        yield gathering
    for layer in part.layers:
        prefix = f"blocks.{layer}."
        used = {id(found): found for name, found in set_of.items() if name.startswith(prefix)}
        gathering = Gathering(list(used.values()), for_step=for_step)
        gathering.apply(model.blocks[str(layer)], model.blocks[str(layer)])
        yield gathering
    if part.is_last:
        used = {id(set_of[name]): set_of[name] for name in ("norm.weight", _head(model)) if name in set_of}
        stays = part.is_first and alone  # the backward pass follows at once
        gathering = Gathering(list(used.values()), for_step=for_step, stays=stays)
        gathering.apply(model.norm, model.head)
        yield gathering


def _head(model: Decoder) -> str:
    """What the head's weight is called: tied, it has the name of the embedding where that is here."""
    tied = model.config.tied_embeddings and not model.copies_embedding
    return "embedding.weight" if tied else "head.weight"


__all__ = ["Gathering", "apply_gathering", "names_by_module"]
