"""Applies tensor and sequence parallelism to a module that knows nothing of it."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.tensor.chunks import run_in_chunks
from evermesh.parallelism.tensor.loss import own_entries
from evermesh.parallelism.tensor.sharding import Cut, TensorSharding, TokenRule
from evermesh.parallelism.tensor.tokens import gather_tokens, scatter_tokens


class VocabularyEmbedding(nn.Module):
    """An embedding of which every rank holds some entries; returns this rank's tokens."""

    def __init__(self, weight: nn.Parameter, vocabulary: int, communicator: Communicator) -> None:
        super().__init__()
        self.weight, self.vocabulary, self.communicator = weight, vocabulary, communicator

    def forward(self, tokens_T: Tensor) -> Tensor:
        """[T] token ids, the same on all ranks, to [T/n, C]. Collective, forward and backward."""
        own_T, is_own_T = own_entries(tokens_T, self.vocabulary, self.communicator)
        x_TC = F.embedding(own_T, self.weight) * is_own_T.unsqueeze(-1)
        return scatter_tokens(x_TC, self.communicator)


def apply_tensor_parallel(
    model: nn.Module, sharding: TensorSharding, communicator: Communicator, chunks: int = 1
) -> dict[str, Cut]:
    """Leave this rank's part of every parameter in ``model``, in place, and communicate tokens around its modules.

    Not collective; ``model`` holds the same whole parameters on all ranks of ``communicator``. Returns the cut of every
    parameter but the experts. From then on forward and backward are collective, and take a multiple of
    ``communicator.size`` tokens. A group of one rank changes nothing. Modules that compute every token by itself do so in
    at most ``chunks`` parts, with the communication of one hidden behind another (``chunks.run_in_chunks``).

    Raises:
        LayoutDoesNotFit: a parameter is too small to give every rank a part; nothing was changed.
    """
    cuts = sharding.cuts({name: parameter.shape for name, parameter in model.named_parameters()}, communicator.size)
    if communicator.size == 1:
        return cuts
    for name, cut in cuts.items():
        parameter = model.get_parameter(name)
        parameter.data = _own_part(parameter.data, cut, communicator.rank)
    for name, module, rule in list(_modules(model, sharding)):
        if rule == "look up":
            vocabulary = cuts[f"{name}.weight"].shape[0]
            model.set_submodule(name, VocabularyEmbedding(module.get_parameter("weight"), vocabulary, communicator))
            continue
        if rule == "token by token" and chunks > 1:
            module.forward = _in_chunks(module.forward, communicator, chunks)
            continue
        module.register_forward_pre_hook(_gathering(communicator))
        if rule != "gather":
            module.register_forward_hook(_scattering(communicator))
    return cuts


def _own_part(whole: Tensor, cut: Cut, rank: int) -> Tensor:
    if cut.dim is None:
        return whole
    start, stop = cut.span(rank)
    return whole.narrow(cut.dim, start, stop - start).clone()


def _modules(model: nn.Module, sharding: TensorSharding) -> Iterator[tuple[str, nn.Module, TokenRule]]:
    for name, module in model.named_modules():
        for pattern, rule in sharding.tokens.items():
            if fnmatchcase(name, pattern):
                yield name, module, rule


def _in_chunks(forward: Any, communicator: Communicator, chunks: int) -> Any:
    def in_chunks(x_tC: Tensor) -> Tensor:
        return run_in_chunks(forward, x_tC, communicator, chunks)

    return in_chunks


def _gathering(communicator: Communicator) -> Any:
    def gather(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return gather_tokens(arguments[0], communicator), *arguments[1:]

    return gather


def _scattering(communicator: Communicator) -> Any:
    def scatter(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return scatter_tokens(output, communicator)

    return scatter
