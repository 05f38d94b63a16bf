"""How a model family says which parts of it are shared by the ranks of a tensor-parallel group; imports no torch.

Source: Shoeybi et al., Megatron-LM (arXiv 1909.08053), for the matrices; Korthikanti et al., Reducing Activation
Recomputation in Large Transformer Models (arXiv 2205.05198, section 4.2.2), for the tokens between them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from evermesh.parallelism.errors import LayoutDoesNotFit

ParameterRule = Literal["column", "row", "vocabulary", "replicated", "experts"]
"""Which part of a parameter a rank holds.

- ``column``: of a layer's outputs, so of dim 0 of its weight [outputs, inputs];
- ``row``: of its inputs, so of dim 1;
- ``vocabulary``: of the entries, dim 0; parts may differ by one entry;
- ``replicated``: all of it. Its gradient is summed over the group, because a rank sees only its tokens;
- ``experts``: none of our business: ``evermesh.parallelism.experts`` shares it among other groups.
"""
TokenRule = Literal["look up", "gather", "gather and scatter", "token by token"]
"""What happens to the tokens around a module. Between modules a rank has its part of them: [T/n, C] of [T, C].

- ``look up``: an embedding takes all token ids and returns this rank's tokens;
- ``gather``: the module sees all tokens, and its output stays as it is;
- ``gather and scatter``: the module sees all tokens; its outputs are summed over the ranks, and each keeps its tokens;
- ``token by token``: the same, and the module computes every token by itself, so it may see them in several parts.
"""
_DIMS: dict[ParameterRule, int | None] = {"column": 0, "row": 1, "vocabulary": 0, "replicated": None}


def part_of(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """[start, stop) of the part of ``size`` that ``rank`` holds; the first ranks hold one more where it does not divide."""
    each, longer = divmod(size, ranks)
    start = rank * each + min(rank, longer)
    return start, start + each + (rank < longer)


def padded_length(num_tokens: int, ranks: int, buckets: Sequence[int] = ()) -> int:
    """The least multiple of ``ranks`` that is no smaller, neither than the first of ``buckets`` that holds the tokens.

    Buckets ascend; no tokens need none, and more than the last one holds are left as they are.
    """
    at_least = next((bucket for bucket in buckets if bucket >= num_tokens), num_tokens) if num_tokens else 0
    return -(-at_least // ranks) * ranks


def chunk_lengths(num_tokens: int, chunks: int) -> tuple[int, ...]:
    """Tokens of each chunk that the ``num_tokens`` of a rank are divided into: at most ``chunks``, none empty unless all is.

    They differ by at most one token, the first are longer.
    """
    number = max(1, min(chunks, num_tokens))
    return tuple(stop - start for start, stop in (part_of(num_tokens, number, chunk) for chunk in range(number)))


@dataclass(frozen=True, slots=True)
class Cut:
    """One parameter, and what each rank of a group holds of it."""

    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    dim: int | None = None
    """The dim that is cut; None: every rank holds all."""
    ranks: int = 1

    def span(self, rank: int) -> tuple[int, int]:
        """[start, stop) of what ``rank`` holds along ``dim``."""
        assert self.dim is not None
        return part_of(self.shape[self.dim], self.ranks, rank)

    def offsets(self, rank: int) -> tuple[int, ...]:
        """First index of this rank's part, along every dim."""
        return tuple(self.span(rank)[0] if dim == self.dim else 0 for dim in range(len(self.shape)))

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of this rank's part."""
        if self.dim is None:
            return self.shape
        start, stop = self.span(rank)
        return tuple(stop - start if dim == self.dim else size for dim, size in enumerate(self.shape))

    def num_elements(self, rank: int) -> int:
        """Elements of this rank's part."""
        return math.prod(self.local_shape(rank))


@dataclass(frozen=True, slots=True)
class TensorSharding:
    """What a model family declares. Names are patterns of ``fnmatch``; of parameters, every one matches exactly one."""

    parameters: Mapping[str, ParameterRule]
    tokens: Mapping[str, TokenRule]
    """By name of the module."""
    equal_parts: tuple[str, ...]
    """Sizes of the model that the degree must divide."""

    def cuts(self, shapes: Mapping[str, Sequence[int]], ranks: int) -> dict[str, Cut]:
        """The cut of every parameter but the experts, given the shapes of the whole ones.

        Raises:
            LayoutDoesNotFit: a parameter is too small to give every rank a part.
        """
        cuts: dict[str, Cut] = {}
        for name, shape in shapes.items():
            rules = {rule for pattern, rule in self.parameters.items() if fnmatchcase(name, pattern)}
            assert len(rules) == 1, f"{name} has the rules {sorted(rules)}; it needs one"
            rule = rules.pop()
            if rule == "experts":
                continue
            cut = Cut(tuple(shape), _DIMS[rule] if ranks > 1 else None, ranks)
            if cut.dim is not None and cut.shape[cut.dim] < ranks:
                raise LayoutDoesNotFit(
                    f"layout.tp is {ranks}, but {name} has only {cut.shape[cut.dim]} indices to share along dim {cut.dim}. "
                    f"Set layout.tp to at most {cut.shape[cut.dim]}.",
                    axis="tp",
                )
            cuts[name] = cut
        return cuts

    def check_degree(self, ranks: int, sizes: Mapping[str, int]) -> None:
        """Raise ``LayoutDoesNotFit``, with the degrees that would do, unless ``ranks`` divides all ``equal_parts``."""
        divided = {name: sizes[name] for name in self.equal_parts}
        broken = [f"{name} {size}" for name, size in divided.items() if size % ranks]
        if broken:
            common = math.gcd(*divided.values())
            legal = ", ".join(str(degree) for degree in range(1, common + 1) if common % degree == 0)
            given = ", ".join(f"{name} {size}" for name, size in divided.items())
            raise LayoutDoesNotFit(
                f"layout.tp is {ranks}, which does not divide {' nor '.join(broken)}. "
                f"A model with {given} can have a layout.tp of {legal}.",
                axis="tp",
            )


__all__ = ["Cut", "ParameterRule", "TensorSharding", "TokenRule", "chunk_lengths", "padded_length", "part_of"]
