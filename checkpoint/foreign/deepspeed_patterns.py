"""What ``universal_checkpoint_info`` of DeepSpeed says about tensor parallelism, as patterns. Imports no torch.

The client, or the library's automatic tensor parallelism, saves it: lists of regular expressions that names of parameters
begin with. A parameter that none of them matches is divided along dim 0. Format: as version 0.19.8 reads and writes it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from evermesh.checkpoint.errors import ForeignUnusable, ShardMapInvalid
from evermesh.checkpoint.foreign.patterns import Combined, Divided, Fused, Pattern, Replicated, Shape, combine
from evermesh.checkpoint.stores.places import Place

INFO = "universal_checkpoint_info"
_AVERAGED = "parameter_to_average_patterns"
_CATEGORIES = (
    "tp_replicated_parameter_patterns",
    _AVERAGED,
    "parameter_with_row_parallelism_patterns",
    "vocabulary_parameter_patterns",
    "parameter_with_2_sub_params_cat_dim_0",
)
_UNSUPPORTED = "autotp_unsupported_parameter_patterns"
_WIDTHS_SINCE = 0.4
"""Version of the information that tells how wide the parts of fused parameters are."""
_MOST_TEXT = 1000
_MOST_TRIALS = 10**8
_CHOICES = re.compile(r"(?<!\\)(?:\\\\)*[*+?|]")
_NOT_PLAIN = re.compile(r"[)}*+?][*+?{]|\{|\(\?|\\[1-9]")
"""What can take a matcher for ever, or that nobody needs in a name."""


class Rules:
    """How tensor-parallel ranks divided the parameters of one checkpoint."""

    def __init__(self, path: Place, info: Any, ranks: int) -> None:
        """``ranks``: of tensor parallelism; with one of them nothing was divided."""
        self.path, self.ranks = path, ranks
        self.info: Mapping[str, Any] = info if isinstance(info, Mapping) else {}
        if ranks > 1 and not self.info:
            raise ForeignUnusable(
                path,
                f"nothing says how its {ranks} tensor-parallel ranks divided the parameters",
                f"Save it with {INFO} in the state of the client, as Megatron-DeepSpeed and automatic tensor "
                f"parallelism do.",
            )
        self.expressions = {key: [self._compiled(text) for text in self.info.get(key, ())] for key in _CATEGORIES}
        self.fused = [(self._compiled(t), spec) for spec in self._specs() for t in spec["patterns"]]
        maps = self.info.get("affine_map", {}).get("params", {}) if self.info else {}
        self.maps = [(self._compiled(text), entry) for text, entry in maps.items()]
        self.unsupported = [self._compiled(text) for text in self.info.get(_UNSUPPORTED, ())]
        self.used: set[str] = set()

    def combined(self, name: str, shapes: Sequence[Shape]) -> Combined:
        """What the ranks hold of the parameter ``name``. Raises ``ForeignUnusable``."""
        vocabulary = self._matches("vocabulary_parameter_patterns", name)
        rows = self.info.get("original_vocab_size") if vocabulary else None
        if rows is not None and (type(rows) is not int or rows < 1):
            raise ForeignUnusable(self.path, f"its vocabulary has {str(rows)[:40]} words", _SAVE_AGAIN)
        try:
            return combine(self._pattern(name, shapes), shapes, rows)
        except ShardMapInvalid as error:
            raise ForeignUnusable(self.path, f"{INFO} does not fit {name}: {error}", _SAVE_AGAIN) from error

    def names(self, name: str) -> bool:
        """Whether something is said about ``name``."""
        every = (*(e for found in self.expressions.values() for e in found), *(e for e, _ in (*self.fused, *self.maps)))
        return any(_is_match(expression, name, self.path) for expression in every)

    def check_all_used(self) -> None:
        """Refuse patterns that matched nothing: the names they mean are others, and were divided along dim 0."""
        known = {e.pattern for found in self.expressions.values() for e in found} | {e.pattern for e, _ in self.fused}
        unused = sorted(known - self.used)
        if unused and self.ranks > 1:
            fact = f"{INFO} has the pattern {unused[0][:100]!r}, which no parameter matches"
            raise ForeignUnusable(self.path, fact, _SAVE_AGAIN)

    def _pattern(self, name: str, shapes: Sequence[Shape]) -> Pattern:
        replicated = self._matches("tp_replicated_parameter_patterns", name)
        averaged = self._matches(_AVERAGED, name)
        by_rows = self._matches("parameter_with_row_parallelism_patterns", name)
        halves = self._matches("parameter_with_2_sub_params_cat_dim_0", name)
        fused = self._first(self.fused, name)
        mapped = self._first(self.maps, name)
        if any(_is_match(expression, name, self.path) for expression in self.unsupported):
            raise ForeignUnusable(self.path, f"{INFO} says that {name} cannot be put together", _SAVE_AGAIN)
        if self.ranks == 1:
            return Replicated()
        if mapped is not None and self._is_whole_everywhere(name, mapped[1]):
            return Replicated()
        if replicated:
            return Replicated()
        if averaged:
            fact = f"{name} is the mean of what its {self.ranks} tensor-parallel ranks hold"
            raise ForeignUnusable(self.path, fact, "Convert it with ds_to_universal, which computes it.")
        if halves:
            return Fused(0, (tuple(-(-shape[0] // 2) for shape in shapes), tuple(shape[0] // 2 for shape in shapes)))
        if fused is not None:
            return self._fused(name, fused[0], fused[1], shapes)
        return Divided(1 if by_rows else 0)

    def _fused(self, name: str, expression: re.Pattern[str], spec: Mapping[str, Any], shapes: Sequence[Shape]) -> Fused:
        dim, sizes = spec["partition_dim"], spec["shape"][spec["partition_dim"]]
        if type(dim) is not int or not 0 <= dim < len(shapes[0]) or len(spec["shape"]) != len(shapes[0]):
            fact = f"{name} of {list(shapes[0])} is put together as {str(spec['shape'])[:60]}"
            raise ForeignUnusable(self.path, fact, _SAVE_AGAIN)
        if self.info.get("universal_checkpoint_version", 0.0) >= _WIDTHS_SINCE:
            widths = self.info.get("sub_param_shard_widths", {})[expression.pattern]
        else:  # each part divided evenly; a number instead of sizes is that of equal parts
            total = sum(shape[dim] for shape in shapes)
            parts = [total // sizes] * sizes if isinstance(sizes, int) and 0 < sizes <= total else list(sizes)
            if any(size % self.ranks for size in parts):
                raise ForeignUnusable(self.path, f"{name} has parts of {parts} on {self.ranks} ranks", _SAVE_AGAIN)
            widths = [[size // self.ranks] * self.ranks for size in parts]
        if any(type(width) is not int or width < 0 for of_part in widths for width in of_part):
            raise ForeignUnusable(self.path, f"a part of {name} has the widths {str(widths)[:60]}", _SAVE_AGAIN)
        return Fused(dim, tuple(tuple(of_part) for of_part in widths))

    def _is_whole_everywhere(self, name: str, entry: Mapping[str, Any]) -> bool:
        """Whether a map of pieces says that every rank holds all of it; pieces are not read further."""
        scales = {piece.get("scale", 1.0) for rank in entry["ranks"].values() for piece in rank["pieces"]}
        if scales - {1.0}:
            fact = f"its ranks hold {name} times {sorted(map(str, scales))[0]}"
            raise ForeignUnusable(self.path, fact, "Convert it with ds_to_universal.")
        return all(tuple(r["shard_shape"]) == tuple(entry["logical_shape"]) for r in entry["ranks"].values())

    def _specs(self) -> Iterator[Mapping[str, Any]]:
        yield from self.info.get("parameter_with_sub_params", ())

    def _matches(self, key: str, name: str) -> bool:
        return self._first(((expression, None) for expression in self.expressions[key]), name) is not None

    def _first(self, expressions: "Iterable[tuple[re.Pattern[str], Any]]", name: str) -> Any:
        found = [(e, value) for e, value in expressions if _is_match(e, name, self.path)]
        self.used |= {expression.pattern for expression, _ in found}
        return found[0] if found else None

    def _compiled(self, text: Any) -> re.Pattern[str]:
        try:
            if not isinstance(text, str) or len(text) > _MOST_TEXT or _NOT_PLAIN.search(text):
                raise re.error("it is no plain pattern of names")
            return re.compile(text)
        except re.error as error:
            fact = f"{INFO} has the pattern {str(text)[:100]!r}: {error}"
            raise ForeignUnusable(self.path, fact, "Use names, wildcards and digits only.") from error


def _is_match(expression: re.Pattern[str], name: str, path: Place) -> bool:
    """As ``re.match``, if it takes no time: each wildcard may try every length."""
    choices = len(_CHOICES.findall(expression.pattern))
    if len(name) ** choices > _MOST_TRIALS:
        fact = f"{INFO} has {choices} wildcards in {expression.pattern[:60]!r} for a name of {len(name)} letters"
        raise ForeignUnusable(path, fact, "Use fewer.")
    return expression.match(name) is not None


_SAVE_AGAIN = f"Correct {INFO} where the checkpoint is saved, or convert it with ds_to_universal."
