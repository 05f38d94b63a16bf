"""A tensor that four ranks saved, as three others read it."""

import numpy as np

from docs.site.pictures.drawing import COLOURS, bare, box, figure, png, title
from evermesh.checkpoint.regions import Box, StoredForm, intersect
from evermesh.checkpoint.rules import DimCut, RankGrid, ShardingRule

_SHAPE = (12, 8)


def resharded() -> bytes:
    """Who wrote which region, who wants which, and what each of those reads of each file."""
    form = StoredForm(_SHAPE)
    saved = _regions(form, ShardingRule(RankGrid(0, ((2, 2), (2, 1))), (DimCut(0, (0,)), DimCut(1, (1,)))))
    wanted = _regions(form, ShardingRule(RankGrid(0, ((3, 1),)), (DimCut(0, (0,)),)))
    made, (before, after) = figure(10, 4.4, 2)
    for rank, region in enumerate(saved):
        _region(before, region, COLOURS[rank], f"rank {rank}")
    title(before, "saved by hdp 2 x tp 2: a file of each rank")
    for rank, region in enumerate(wanted):
        read = []
        for writer, other in enumerate(saved):
            runs = intersect(other, form, region, form)
            if elements := int(np.sum(runs.length)):
                read.append(f"{elements} of rank {writer}'s {int(np.prod(other.sizes))}")
                _common(after, region, other, COLOURS[writer])
        middle = region.offsets[0] + region.sizes[0] / 2
        after.text(
            _SHAPE[1] + 0.3, _SHAPE[0] - middle, f"rank {rank} reads\n" + "\n".join(read), va="center", fontsize=9
        )
    for region in wanted[1:]:
        after.axhline(_SHAPE[0] - region.offsets[0], color="black", linewidth=2.4, xmax=_SHAPE[1] / (_SHAPE[1] + 5.2))
    title(after, "loaded by three ranks: nothing is converted, nothing read twice")
    for axes in (before, after):
        axes.set_xlim(0, _SHAPE[1] + 5.2)
        axes.set_ylim(0, _SHAPE[0])
        bare(axes)
    before.set_xlim(0, _SHAPE[1])
    return png(made)


def _regions(form: StoredForm, rule: ShardingRule) -> list[Box]:
    return [region for region, _ in rule.holdings(form) if isinstance(region, Box)]


def _region(axes: object, region: Box, colour: str, text: str = "") -> None:
    (row, column), (rows, columns) = region.offsets, region.sizes
    box(axes, column, _SHAPE[0] - row - rows, columns, rows, colour, text)


def _common(axes: object, a: Box, b: Box, colour: str) -> None:
    starts = [max(x, y) for x, y in zip(a.offsets, b.offsets, strict=True)]
    stops = [min(x + m, y + n) for x, m, y, n in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)]
    _region(axes, Box(tuple(starts), tuple(stop - start for start, stop in zip(starts, stops, strict=True))), colour)
