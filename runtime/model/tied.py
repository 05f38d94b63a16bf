"""Tied embeddings whose two ends are on different ranks of a pipeline."""

import torch

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.gradients import gradient_of, keep_gradient
from evermesh.parallelism.tensor import Cut
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.parameter_set import ParameterSet
from evermesh.runtime.process_group import Groups

CALL_SITE = "tied embeddings"


class TiedHead:
    """One end of the pair: the embedding, which is trained, or the head, which is a copy of it.

    Source: Megatron-LM (Shoeybi et al., arXiv 1909.08053) ties them the same way, and steps both; here only the first
    end has optimizer state, so that the state of every parameter is in one place.
    """

    def __init__(self, weight: torch.nn.Parameter, pair: Communicator) -> None:
        self.weight, self.pair = weight, pair
        self.trained: ParameterSet | None = None
        """What holds the embedding, at its end."""

    @classmethod
    def of(cls, model: Decoder, cuts: dict[str, Cut], groups: Groups) -> "TiedHead | None":
        """The end that this rank holds, if it holds one of two; takes the copy out of ``cuts``. Not collective."""
        if groups.tied is None:
            return None
        if not model.copies_embedding:
            return cls(model.get_parameter("embedding.weight"), groups.tied)
        del cuts["head.weight"]
        weight = model.get_parameter("head.weight")
        keep_gradient(weight, torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)))
        return cls(weight, groups.tied)

    def begin_step(self) -> None:
        """Forget the gradients of the last step; those of the embedding are not ours to forget."""
        if self.pair.rank == 1:
            gradient_of(self.weight).zero_()

    def sum_gradients(self) -> None:
        """Add the gradient of the copy to that of the embedding. Collective over the pair, and over the owners of the
        embedding; before any other sum."""
        if self.trained is None or self.trained.keeps_gradients:
            self.pair.all_reduce(gradient_of(self.weight), CALL_SITE)
            return
        received = torch.zeros_like(self.weight, dtype=self.trained.gradients.dtype)
        self.pair.all_reduce(received, CALL_SITE)
        self.trained.reduce({"embedding.weight": received})

    def copy(self) -> None:
        """Make the copy equal again. Collective as ``sum_gradients`` is; whenever the embedding has changed."""
        if self.trained is not None:
            self.trained.gather()
        self.pair.broadcast(self.weight.data, 0, CALL_SITE)
        if self.trained is not None:
            self.trained.free()
