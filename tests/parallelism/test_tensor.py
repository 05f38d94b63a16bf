"""The tokens and the loss of a tensor-parallel group against one process; what each rank holds; what is refused."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from evermesh.parallelism import Communicator, LayoutDoesNotFit
from evermesh.parallelism.tensor import Cut, TensorSharding, padded_length, part_of
from evermesh.parallelism.tensor.apply import apply_tensor_parallel
from evermesh.parallelism.tensor.loss import cross_entropy
from evermesh.parallelism.tensor.tokens import gather_tokens, pad_tokens, scatter_tokens, without_padding
from tests.cluster import run_ranks
from tests.oracle import gradient, relative_error

TOKENS = (0, 1, 2, 3, 7, 12)
VOCABULARIES = (5, 12, 61)


@given(size=st.integers(1, 200), ranks=st.integers(1, 12))
def test_parts_cover_everything_once_and_differ_by_one(size: int, ranks: int) -> None:
    parts = [part_of(size, ranks, rank) for rank in range(ranks)]
    assert [index for start, stop in parts for index in range(start, stop)] == list(range(size))
    assert max(b - a for a, b in parts) - min(b - a for a, b in parts) <= 1
    assert padded_length(size, ranks) % ranks == 0
    assert size <= padded_length(size, ranks) < size + ranks


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _tokens_there_and_back(rank: int, ranks: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Gather, weight by rank, scatter: outputs and gradients."""
    import torch.distributed as dist

    communicator, results = Communicator(dist.group.WORLD), []
    for tokens in TOKENS:
        each = padded_length(tokens, ranks) // ranks
        own = _random(ranks * each, 3, seed=tokens)[rank * each : (rank + 1) * each].clone().requires_grad_()
        whole = gather_tokens(own, communicator)
        out = scatter_tokens(whole.sin() * (rank + 1), communicator)
        (out * _random(ranks * each, 3, seed=50 + tokens)[rank * each : (rank + 1) * each]).sum().backward()
        results.append((whole.detach(), out.detach(), gradient(own)))
    return results


@pytest.mark.parametrize("ranks", [2, 3])
def test_gathered_and_scattered_tokens_and_their_gradients_equal_one_process(ranks: int) -> None:
    results = run_ranks(ranks, _tokens_there_and_back)
    for index, tokens in enumerate(TOKENS):
        length = padded_length(tokens, ranks)
        x = _random(length, 3, seed=tokens).requires_grad_()
        out = x.sin() * sum(range(1, ranks + 1))
        (out * _random(length, 3, seed=50 + tokens)).sum().backward()
        for whole, _, _ in (of_rank[index] for of_rank in results):
            assert torch.equal(whole, x.detach())
        assert torch.allclose(torch.cat([of_rank[index][1] for of_rank in results]), out.detach(), rtol=1e-13)
        assert torch.allclose(torch.cat([of_rank[index][2] for of_rank in results]), gradient(x), rtol=1e-13)


def _loss_inputs(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = 30 * _random(tokens, vocabulary, seed=vocabulary)  # far apart: without the shift they overflow in float32
    return logits, torch.arange(tokens) * 7 % vocabulary, _random(tokens, seed=9)


def _losses(rank: int, ranks: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, int]]:
    """Loss of every token, gradient of the own logits, largest number of elements sent at once."""
    import torch.distributed as dist

    communicator, results = Communicator(dist.group.WORLD), []
    for vocabulary in VOCABULARIES:
        for tokens in TOKENS:
            logits, targets, weights = _loss_inputs(tokens, vocabulary)
            start, stop = part_of(vocabulary, ranks, rank)
            own = logits[:, start:stop].to(dtype).requires_grad_()
            sent = [0]
            with communicator.listen(lambda record, sent=sent: sent.append(record.num_bytes)):  # type: ignore[misc]
                losses = cross_entropy(own, targets, vocabulary, communicator)
                (losses * weights.to(dtype)).sum().backward()
            results.append((losses.detach(), gradient(own), max(sent) // own.element_size()))
    return results


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float64), (4, torch.float32)])
def test_loss_of_a_shared_vocabulary_equals_that_of_all_logits(ranks: int, dtype: torch.dtype) -> None:
    results = run_ranks(ranks, _losses, dtype)
    cases = [(vocabulary, tokens) for vocabulary in VOCABULARIES for tokens in TOKENS]
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    for index, (vocabulary, tokens) in enumerate(cases):
        logits, targets, weights = _loss_inputs(tokens, vocabulary)
        logits = logits.to(dtype).requires_grad_()
        losses = F.cross_entropy(logits, targets, reduction="none")
        (losses * weights.to(dtype)).sum().backward()
        for own, _, most_sent in (of_rank[index] for of_rank in results):
            assert torch.equal(own, results[0][index][0]), "ranks differ"
            assert torch.allclose(own, losses.detach(), rtol=tolerance, atol=tolerance)
            assert most_sent <= 2 * tokens, "logits were sent"
        gradients = torch.cat([of_rank[index][1] for of_rank in results], dim=1)
        assert relative_error(gradients.double(), gradient(logits).double()) <= tolerance


def test_padding_reaches_no_attention() -> None:
    seen: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
        assert window == 3
        seen.append(q.shape[0] + k.shape[0] + v.shape[0])
        return q + 1

    q = torch.zeros(pad_tokens(torch.arange(5), 4).shape[0], 2, 3)
    out = without_padding(attend, 5)(q, q, q, window=3)
    assert seen == [15]
    assert torch.equal(out, F.pad(torch.ones(5, 2, 3), (0, 0, 0, 0, 0, 3)))


class _Mixer(nn.Module):
    """Not a decoder: two tables, one hidden layer behind a gate, tokens mixed by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.scale = nn.LayerNorm(6)
        self.layer = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 6, bias=False))
        self.out = nn.Linear(6, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.out(x + self.layer(self.scale(x)))


MIXER = TensorSharding(
    parameters={
        "table.*": "vocabulary",
        "scale.*": "replicated",
        "layer.0.*": "column",
        "layer.2.*": "row",
        "out.*": "vocabulary",
    },
    tokens={"table": "look up", "layer": "gather and scatter", "out": "gather"},
    equal_parts=("width",),
)


def _mixed(rank: int, ranks: int) -> tuple[Tensor, dict[str, Any]]:
    import torch.distributed as dist

    torch.manual_seed(0)
    model, communicator = _Mixer().double(), Communicator(dist.group.WORLD)
    cuts = apply_tensor_parallel(model, MIXER, communicator)
    tokens = torch.arange(6) * 5 % 11
    cross_entropy(model(tokens), tokens.flip(0), 11, communicator).sum().backward()
    held = {name: (cuts[name], parameter.detach(), gradient(parameter)) for name, parameter in model.named_parameters()}
    return model(tokens).detach(), held


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_model_is_shared_by_its_table_alone(ranks: int) -> None:
    torch.manual_seed(0)
    alone, tokens = _Mixer().double(), torch.arange(6) * 5 % 11
    logits = alone(tokens)
    F.cross_entropy(logits, tokens.flip(0), reduction="sum").backward()
    results = run_ranks(ranks, _mixed)
    assert torch.allclose(torch.cat([own for own, _ in results], dim=1), logits.detach(), rtol=1e-12)
    for name, parameter in alone.named_parameters():
        parts = [held[name] for _, held in results]
        cut = parts[0][0]
        if cut.dim is None:
            assert torch.allclose(sum(part[2] for part in parts), gradient(parameter), rtol=1e-12, atol=1e-14)
            continue
        assert torch.equal(torch.cat([part[1] for part in parts], dim=cut.dim), parameter.detach())
        assert torch.allclose(torch.cat([part[2] for part in parts], dim=cut.dim), gradient(parameter), rtol=1e-12)


def test_a_cut_tells_every_rank_its_part() -> None:
    cut = Cut((7, 4), 0, 3)
    assert [cut.local_shape(rank) for rank in range(3)] == [(3, 4), (2, 4), (2, 4)]
    assert [cut.offsets(rank) for rank in range(3)] == [(0, 0), (3, 0), (5, 0)]
    assert Cut((7, 4)).local_shape(0) == (7, 4)


def test_a_group_of_one_changes_nothing() -> None:
    model = _Mixer()
    before = [type(module) for module in model.modules()]
    assert all(cut.dim is None for cut in apply_tensor_parallel(model, MIXER, Communicator()).values())
    assert [type(module) for module in model.modules()] == before


def test_degrees_that_do_not_divide_are_refused_with_those_that_do() -> None:
    MIXER.check_degree(4, {"width": 8})
    with pytest.raises(
        LayoutDoesNotFit, match=r"layout.tp is 3, which does not divide width 8.*a layout.tp of 1, 2, 4, 8"
    ):
        MIXER.check_degree(3, {"width": 8})


def test_a_vocabulary_smaller_than_the_group_is_refused() -> None:
    with pytest.raises(LayoutDoesNotFit, match=r"out.weight has only 3 .* Set layout.tp to at most 3"):
        MIXER.cuts({"out.weight": (3, 16)}, 4)


def test_a_parameter_without_a_rule_is_a_bug_that_is_named() -> None:
    with pytest.raises(AssertionError, match=r"other\.weight has the rules"):
        MIXER.cuts({"other.weight": (3, 16)}, 2)
