"""Where ranks stand in a layout, and what a layout does to memory."""

from docs.site.pictures.drawing import COLOURS, FAINT, bare, box, figure, png, title
from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.layout.activations import Precision
from evermesh.parallelism.layout.memory import fullest, layout_memory
from evermesh.parallelism.mesh import Axis, Mesh
from evermesh.parallelism.tiers import Tiers

_MODEL = ModelShape(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14_336, vocabulary=128_256)
_DIVIDED = Tiers(parameters="all", gradients="all", keep_for="micro_batch")
_CHOICES = (
    ("hdp 64", Layout(hdp=64, capacity=8192)),
    ("hdp 64,\nall divided", Layout(hdp=64, capacity=8192, sharding=_DIVIDED)),
    ("the same,\nrecompute", Layout(hdp=64, capacity=8192, sharding=_DIVIDED, activations="recompute")),
    ("tp 8, hdp 8", Layout(hdp=8, tp=8, capacity=8192)),
    ("pp 4, tp 4,\nhdp 4", Layout(hdp=4, tp=4, pp=4, capacity=8192)),
)
_GIB = 2**30


def mesh() -> bytes:
    """All ranks of a layout, once for each axis, coloured by the group in which they talk."""
    ranks = Mesh(hdp=4, tp=2, pp=2, ep=4)
    axes_of: tuple[tuple[Axis, str], ...] = (
        ("tp", "tp 2: share every matrix"),
        ("hdp", "hdp 4: share the documents"),
        ("pp", "pp 2: share the layers"),
        ("ep", "ep 4: share the experts"),
    )
    made, panels = figure(11, 3.1, len(axes_of))
    for panel, (axis, words) in zip(panels, axes_of, strict=True):
        for number, group in enumerate(ranks.groups(axis)):
            for rank in group:
                place = ranks.coordinates(rank)
                x, y = place.tp + 2.4 * place.pp, 3 - place.hdp
                box(panel, x, y, 0.94, 0.94, COLOURS[number % len(COLOURS)], str(rank))
        panel.set_xlim(-0.2, 4.6)
        panel.set_ylim(-0.2, 4.2)
        panel.set_aspect("equal")
        bare(panel)
        title(panel, words)
    words = f"{ranks.size} ranks, pp 2 x hdp 4 x tp 2: ranks of one colour talk to each other"
    made.suptitle(words, fontsize=11.5, x=0.01, ha="left")
    return png(made)


def memory() -> bytes:
    """What a device needs for a model of eight billion parameters, in layouts of 64 ranks."""
    made, (axes,) = figure(10, 4.4)
    precision = Precision(element_bytes=2)
    found = [fullest(layout_memory(_MODEL, layout, precision)).parts for _, layout in _CHOICES]
    names = [name for name in found[0] if any(parts[name] for parts in found)]
    labels = [words for words, _ in _CHOICES]
    for number, name in enumerate(names):
        below = [sum(parts[other] for other in names[:number]) / _GIB for parts in found]
        colour = FAINT if name == "reserve" else COLOURS[number % len(COLOURS)]
        heights = [parts[name] / _GIB for parts in found]
        axes.bar(labels, heights, bottom=below, color=colour, label=name, width=0.6)
    for place, parts in enumerate(found):
        total = sum(parts.values()) / _GIB
        axes.text(place, total, f"{total:.0f} GiB", ha="center", va="bottom", fontsize=9.5)
    axes.axhline(80, color="#c0392b", linestyle="--", linewidth=1.2)
    axes.text(len(found) - 0.55, 81, "80 GB device", color="#c0392b", fontsize=9, ha="right", va="bottom")
    axes.set_ylabel("GiB of a device, bfloat16, micro-batches of 8,192 tokens")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    title(axes, "the same eight billion parameters on 64 ranks")
    return png(made)
