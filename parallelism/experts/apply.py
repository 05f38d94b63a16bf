"""Applies expert parallelism to a module that knows nothing of it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.experts.dispatch import Dispatcher
from evermesh.parallelism.experts.sharding import ExpertSharding, GridCut


def apply_expert_parallel(
    model: nn.Module, sharding: ExpertSharding, ep: Communicator, etp: Communicator
) -> dict[str, GridCut]:
    """Leave this rank's experts in ``model``, in place, and let its dispatchers send tokens to those of the others.

    Not collective; ``model`` holds the same whole stacks of experts on all ranks. Returns the cut of every stack, for
    rank ``ep.rank * etp.size + etp.rank``. From then on forward and backward are collective over ``ep`` and ``etp``.
    Groups of one rank change nothing.

    Raises:
        LayoutDoesNotFit: a degree does not divide the experts or their width; nothing was changed.
    """
    parameters = dict(model.named_parameters())
    cuts = sharding.cuts({name: parameter.shape for name, parameter in parameters.items()}, ep.size, etp.size)
    rank = ep.rank * etp.size + etp.rank
    for name, cut in cuts.items():
        parameters[name].data = _own_part(parameters[name].data, cut, rank)
    for _, dispatcher, _ in mixtures(model):
        dispatcher.join(ep, etp)
    return cuts


def mixtures(model: nn.Module) -> Iterator[tuple[str, Dispatcher, nn.Module]]:
    """Name of the parent, dispatcher and experts of every mixture: a dispatcher has a sibling called ``experts``."""
    for name, module in model.named_modules():
        if isinstance(module, Dispatcher):
            parent = name.rpartition(".")[0]
            yield parent, module, model.get_submodule(f"{parent}.experts" if parent else "experts")


def _own_part(whole: Tensor, cut: GridCut, rank: int) -> Tensor:
    if cut.ranks == 1:
        return whole
    part = whole
    for dim, (start, stop) in cut.spans(rank).items():
        part = part.narrow(dim, start, stop - start)
    return part.clone(memory_format=torch.contiguous_format)
