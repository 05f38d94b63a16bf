"""A batch plan as a picture: when every rank runs which micro-batch, as PNG and as text."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.simulator import Span, Timeline

_COLOURS = ("#9fb8d6", "#4f86c6", "#3aa17e", "#e0a030", "#d9713c", "#b8405e", "#7b4b94")
"""Of rings of 1 to 7 ranks, in every picture."""
_COLOURS_OF_LARGE = ("#3f3f74", "#11757e", "#7a4a21", "#8c8f2c", "#c06fb0", "#5b5b5b", "#101010")
"""Of larger rings, in the order of the sizes that a plan has."""
_MOST_SIZES = 12
_HEADLINE_WIDTH = 150
_STYLES = (
    "black on bright_blue",
    "black on cyan",
    "black on green",
    "black on yellow",
    "black on magenta",
    "white on red",
)
_MAX_LABELLED_RANKS = 32


def certificate_line(plan: BatchPlan) -> str:
    """How good the plan is, next to what no plan can beat."""
    certificate = plan.certificate
    return (
        f"makespan {seconds(certificate.makespan_s)}, bound {seconds(certificate.lower_bound_s)} "
        f"({certificate.binding}), ratio {certificate.ratio:.3f}, fill {plan.fill:.0%}"
    )


def offload_line(plan: BatchPlan) -> str | None:
    """Which fractions of their tokens micro-batches offload; None: nothing waits in host memory."""
    moved = [
        (micro_batch.offload, micro_batch.num_tokens)
        for of_rank in plan.ranks
        for micro_batch in of_rank
        if micro_batch.recompute == "block" and micro_batch.pieces
    ]
    if not any(fraction for fraction, _ in moved):
        return None
    fractions = [fraction for fraction, _ in moved]
    mean = sum(fraction * tokens for fraction, tokens in moved) / plan.num_tokens
    return (
        f"offloaded: the products of {mean:.0%} of all tokens; of {min(fractions):.0%} to {max(fractions):.0%} of those of "
        f"each of {len(moved):,} micro-batches"
    )


def headline(plan: BatchPlan) -> str:
    """What is in the batch and how it was cut."""
    rings = ", ".join(_rings(plan.ring_sizes()))
    counts = [len(micro_batches) for micro_batches in plan.ranks]
    return (
        f"{len(plan.lengths):,} sequences, {plan.num_tokens:,} tokens, longest {max(plan.lengths):,}; "
        f"{len(plan.ranks)} ranks of {plan.capacity:,} tokens. Sequences: {rings}. "
        f"Micro-batches per rank: {min(counts)} to {max(counts)}."
    )


def _rings(sizes: Mapping[int, int]) -> list[str]:
    """So many sequences on so many ranks; many sizes are told by powers of two."""
    if len(sizes) <= _MOST_SIZES:
        return [f"{count:,} on {'1 rank' if size == 1 else f'{size} ranks'}" for size, count in sizes.items()]
    found = []
    for low in (1 << power for power in range(max(sizes).bit_length())):
        inside = [size for size in sizes if low <= size < 2 * low]
        if inside:
            names = f"{min(inside)} to {max(inside)}" if len(inside) > 1 else str(inside[0])
            unit = "rank" if names == "1" else "ranks"
            found.append(f"{sum(sizes[size] for size in inside):,} on {names} {unit}")
    return found


def seconds(value: float) -> str:
    """A time with the unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def plan_text(plan: BatchPlan, timeline: Timeline, *, width: int = 100) -> Text:
    """One row per rank; a block is a micro-batch: ``ring size:tokens``, coloured by ring size."""
    label_width, total_width = max(map(len, timeline.labels)), len(f"{plan.num_tokens:,}")
    room = max(20, width - label_width - total_width - 4)
    scale = room / timeline.makespan_s if timeline.makespan_s else 0.0
    text = Text(no_wrap=True)
    for label, spans in zip(timeline.labels, _by_rank(timeline), strict=True):
        row = Text(f"{label:<{label_width}} ")
        for span in spans:
            start, stop = round(span.start_s * scale), round(span.stop_s * scale)
            row.append(" " * (start + label_width + 1 - len(row)))
            row.append(_block(span, stop - start), _style(span.ring_size))
        tokens = sum(span.num_tokens for span in spans if not span.is_backward)
        row.append(" " * (room + label_width + 1 - len(row)) + f" {tokens:>{total_width},}\n")
        text.append_text(row)
    return text.append_text(_key(plan, timeline))


def _block(span: Span, width: int) -> str:
    """``[2:1,024──]`` as far as it fits; a narrow block is the ring size alone. A backward pass alone has round brackets."""
    left, right = "()" if span.is_backward else "[]"
    for inner in (f"{span.ring_size}:{span.num_tokens:,}", f"{span.ring_size}:{span.num_tokens}", f"{span.ring_size}"):
        if len(inner) + 2 <= width:
            return f"{left}{inner.ljust(width - 2, '─')}{right}"
    return (f"{span.ring_size}" if span.ring_size < 10 else "+").ljust(width, right)[:width]


def _key(plan: BatchPlan, timeline: Timeline) -> Text:
    key = Text("[ring size:tokens]  ", style="dim")
    for size in plan.ring_sizes():
        key.append(f" {size} ", _style(size)).append(
            " one rank  " if size == 1 else f" ring of {size}  ", style="default"
        )
    backward = ", (backward pass)" if any(span.is_backward for span in timeline.spans) else ""
    return key.append(f"right: all tokens{backward}", style="dim")


def _style(ring_size: int) -> str:
    return _STYLES[min(ring_size, len(_STYLES)) - 1]


def plan_png(plan: BatchPlan, timeline: Timeline, path: Path, *, title: str) -> None:
    """Write the timeline as a picture: one row per rank, micro-batches coloured by ring size, the bound as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.9 + min(10.0, 0.42 * len(timeline.labels))), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    factor, unit = (1.0, "s") if timeline.makespan_s >= 1 else (1e3, "ms")
    colours = ring_colours(plan)
    for span in timeline.spans:
        _draw_span(axes, span, factor, colours[span.ring_size])
    bound = plan.certificate.lower_bound_s * factor
    axes.axvline(
        bound,
        color="#c0392b",
        linestyle="--",
        linewidth=1.3,
        label=f"lower bound\n({plan.certificate.binding})",
        zorder=2,
    )
    _dress(axes, timeline, colours, unit, max(timeline.makespan_s * factor, bound))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    facts = textwrap.fill(headline(plan), _HEADLINE_WIDTH)
    axes.set_title(f"{facts}\n{certificate_line(plan)}", loc="left", fontsize=9, color="#444444")
    figure.draw_without_rendering()
    _drop_wide_labels(axes)
    figure.savefig(path, format="png")


def ring_colours(plan: BatchPlan) -> dict[int, str]:
    """The colour of every ring size of ``plan``: different sizes differ, and small ones look the same in all plans."""
    large = (size for size in plan.ring_sizes() if size > len(_COLOURS))
    found = {size: _COLOURS[size - 1] for size in plan.ring_sizes() if size <= len(_COLOURS)}
    return found | dict(zip(large, itertools.cycle(_COLOURS_OF_LARGE), strict=False))


def _by_rank(timeline: Timeline) -> list[list[Span]]:
    rows: list[list[Span]] = [[] for _ in timeline.labels]
    for span in timeline.spans:
        rows[span.rank].append(span)
    return rows


def _draw_span(axes: Any, span: Span, factor: float, colour: str) -> None:
    start, width = span.start_s * factor, (span.stop_s - span.start_s) * factor
    look: dict[str, Any] = {"color": colour, "edgecolor": "white", "linewidth": 1.0}
    axes.barh(span.rank, width, left=start, height=0.78, hatch="///" if span.is_backward else None, **look)
    if span.is_backward:
        return  # its tokens are those of the forward pass
    ink = "black" if _is_light(colour) else "white"
    place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "color": ink, "gid": str(width)}
    axes.text(start + width / 2, span.rank, f"{span.num_tokens:,}", **place)


def _is_light(colour: str) -> bool:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue > 110


def _drop_wide_labels(axes: Any) -> None:
    """Remove the labels that are larger than their block."""
    left, top = axes.transData.transform((0, 0))
    for label in list(axes.texts):
        right, bottom = axes.transData.transform((float(label.get_gid()), 1))
        box = label.get_window_extent()
        if box.width > right - left - 4 or box.height > 0.9 * abs(bottom - top):
            label.remove()


def _dress(axes: Any, timeline: Timeline, colours: Mapping[int, str], unit: str, end: float) -> None:
    from matplotlib.patches import Patch

    patches: Sequence[Any] = [
        Patch(color=colour, label="one rank" if size == 1 else f"ring of {size}") for size, colour in colours.items()
    ]
    handles = [*patches, *axes.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    axes.set_xlim(0, end * 1.005)
    axes.set_ylim(len(timeline.labels) - 0.5, -0.5)
    if len(timeline.labels) <= _MAX_LABELLED_RANKS:
        axes.set_yticks(range(len(timeline.labels)), timeline.labels)
    else:
        axes.set_ylabel("rank")
    backward = "; hatched: its backward pass" if any(span.is_backward for span in timeline.spans) else ""
    axes.set_xlabel(
        f"predicted time, {unit}. A block is a micro-batch with its tokens on that rank{backward}; white is idle time"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
