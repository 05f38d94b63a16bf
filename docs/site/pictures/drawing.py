"""What all pictures share: size, colours, and how they become bytes."""

import io
from typing import Any

COLOURS = ("#4f86c6", "#3aa17e", "#e0a030", "#d9713c", "#b8405e", "#7b4b94", "#11757e", "#8c8f2c")
"""Of ranks, nodes and stripes, by number."""
INK, FAINT = "#333333", "#d5dae2"


def figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure of so many inches with axes side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(made)
    return made, list(made.subplots(1, columns, squeeze=False)[0])


def bare(axes: Any) -> None:
    """No frame, no ticks."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def box(axes: Any, x: float, y: float, width: float, height: float, colour: str, text: str = "", **look: Any) -> None:
    """A filled rectangle with words in its middle."""
    from matplotlib.patches import Rectangle

    style: dict[str, Any] = {"facecolor": colour, "edgecolor": "white", "linewidth": 1.2} | look
    axes.add_patch(Rectangle((x, y), width, height, **style))
    if text:
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, color="white")


def title(axes: Any, text: str) -> None:
    """Left above the axes."""
    axes.set_title(text, loc="left", fontsize=10.5, color=INK)


def png(made: Any) -> bytes:
    """The picture; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
