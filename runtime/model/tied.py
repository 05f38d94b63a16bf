"""Tied embeddings whose two ends are on different ranks of a pipeline."""

import torch
from torch import Tensor

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.tensor import Cut
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.process_group import Groups

CALL_SITE = "tied embeddings"


class TiedHead:
    """One end of the pair: the embedding, which is trained, or the head, which is a copy of it.

    Source: Megatron-LM (Shoeybi et al., arXiv 1909.08053) ties them the same way, and steps both; here only the first
    end has optimizer state, so that the state of every parameter is in one place.
    """

    def __init__(self, weight: torch.nn.Parameter, pair: Communicator) -> None:
        self.weight, self.pair = weight, pair

    @classmethod
    def of(cls, model: Decoder, cuts: dict[str, Cut], groups: Groups) -> "TiedHead | None":
        """The end that this rank holds, if it holds one of two; takes the copy out of ``cuts``. Not collective."""
        if groups.tied is None:
            return None
        if not model.copies_embedding:
            return cls(model.get_parameter("embedding.weight"), groups.tied)
        del cuts["head.weight"]
        weight = model.get_parameter("head.weight")
        weight.grad = torch.zeros_like(weight)
        return cls(weight, groups.tied)

    def begin_step(self) -> None:
        """Forget the gradients of the last step; those of the embedding are not ours to forget."""
        if self.pair.rank == 1:
            self._gradient.zero_()

    def sum_gradients(self) -> None:
        """Add the gradient of the copy to that of the embedding. Collective over the pair, before any other sum."""
        self.pair.all_reduce(self._gradient, CALL_SITE)

    def copy(self) -> None:
        """Make the copy equal again. Collective over the pair, whenever the embedding has changed."""
        self.pair.broadcast(self.weight.data, 0, CALL_SITE)

    @property
    def _gradient(self) -> Tensor:
        assert self.weight.grad is not None
        return self.weight.grad
