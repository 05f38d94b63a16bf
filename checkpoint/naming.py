"""How tensors are called and cut in checkpoints of another project, given as a table of names; imports no torch.

A table maps patterns of our names to patterns of theirs. ``{word}`` stands for a number and is the same on both sides:

- ``"blocks.{layer}.norm.weight": "model.layers.{layer}.norm.weight"``: one tensor, another name;
- ``"blocks.{layer}.experts.up": "layers.{layer}.experts.{expert}.up.weight"``: a word that only they have is an index
  along dim 0 of ours: one of their tensors for each, *stacked* in ours;
- several patterns of ours with one pattern of theirs: ours lie in theirs one after the other along dim 0, *fused*, in the
  order of the table.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from evermesh.checkpoint.coverage import check_cover, whole
from evermesh.checkpoint.errors import ShardMapInvalid
from evermesh.checkpoint.regions import Box, StoredForm

_WORD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class ForeignPart:
    """Where a box of one of our tensors lies in one of theirs."""

    name: str
    """Of their tensor."""
    start: int
    """The element of its row-major storage with which the row-major storage of the box begins."""
    box: Box
    """Of our tensor."""


@dataclass(frozen=True, slots=True)
class Naming:
    """A table of names, applied to the tensors of one model."""

    parts: dict[str, tuple[ForeignPart, ...]]
    """By our name; the boxes cover the tensor once."""
    shapes: dict[str, tuple[int, ...]]
    """Of our tensors."""
    foreign_shapes: dict[str, tuple[int, ...]]
    """Of theirs."""
    unread: tuple[str, ...] = ()
    """Patterns (``fnmatch``) of tensors that their checkpoints may hold beyond these, and that nothing depends on."""

    def is_unread(self, name: str) -> bool:
        """Whether one of their tensors may be passed over."""
        return any(fnmatchcase(name, pattern) for pattern in self.unread)


def bind(names: Mapping[str, str], shapes: Mapping[str, Sequence[int]], unread: Sequence[str] = ()) -> Naming:
    """Apply a table to the tensors of a model, given their whole shapes.

    Raises:
        ShardMapInvalid: a tensor matches no pattern or several, or fused tensors differ beyond dim 0.
    """
    parts: dict[str, tuple[ForeignPart, ...]] = {}
    foreign: dict[str, tuple[int, ...]] = {}
    for ours, theirs in names.items():  # in the order of the table: that of fused tensors
        for name, words in _matches(ours, shapes):
            if name in parts:
                raise ShardMapInvalid(f"tensor {name} matches two patterns of the table. Make them exclude each other.")
            parts[name] = tuple(_parts(theirs.format_map(_Kept(words)), tuple(shapes[name]), foreign))
    unnamed = sorted(shapes.keys() - parts.keys())
    if unnamed:
        raise ShardMapInvalid(f"the table has no name for {', '.join(unnamed[:5])}. Add them, or use another family.")
    for name, shape in shapes.items():
        check_cover(StoredForm(tuple(shape)), tuple(whole(part.box) for part in parts[name]))
    return Naming(parts, {name: tuple(shape) for name, shape in shapes.items()}, foreign, tuple(unread))


class _Kept(dict[str, str]):
    """Leaves words that only their side has as they are."""

    def __missing__(self, word: str) -> str:
        return f"{{{word}}}"


def _matches(pattern: str, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, dict[str, str]]]:
    literals = _WORD.split(pattern)  # literal, word, literal, ...
    expression = "".join(
        f"(?P<{part}>[0-9]+)" if position % 2 else re.escape(part) for position, part in enumerate(literals)
    )
    for name in shapes:
        if found := re.fullmatch(expression, name):
            yield name, found.groupdict()


def _parts(theirs: str, shape: tuple[int, ...], foreign: dict[str, tuple[int, ...]]) -> Iterator[ForeignPart]:
    """The parts of one of our tensors; enters their shapes, or what is added to them, into ``foreign``."""
    words = _WORD.findall(theirs)
    if not words:
        yield ForeignPart(theirs, _append(theirs, shape, foreign), Box((0,) * len(shape), shape))
        return
    for index in range(shape[0]):
        name = theirs.format(**{words[0]: index})
        box = Box((index, *(0,) * (len(shape) - 1)), (1, *shape[1:]))
        yield ForeignPart(name, _append(name, shape[1:], foreign), box)


def _append(name: str, shape: tuple[int, ...], foreign: dict[str, tuple[int, ...]]) -> int:
    """Add ``shape`` to one of their tensors along dim 0; returns its first element there."""
    if name not in foreign:
        foreign[name] = shape
        return 0
    before = foreign[name]
    if not shape or before[1:] != shape[1:]:
        raise ShardMapInvalid(f"{name} cannot hold {shape} behind {before}: fused tensors may differ in dim 0 only.")
    foreign[name] = (before[0] + shape[0], *shape[1:])
    return math.prod(before)
