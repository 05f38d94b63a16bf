"""The states of a job and what leads from one to another, read from the code that decides."""

import ast
import inspect
from collections.abc import Iterator
from typing import Any

from docs.site.pictures.drawing import COLOURS, FAINT, INK, bare, figure, png, title
from evermesh.launcher.controller import machine
from evermesh.launcher.controller.status import ENDED

_PLACES = {
    "placing": (0, 2), "starting": (2, 2), "training": (4, 2), "regrouping": (4, 3.3), "stopping": (6, 2.7),
    "recovering": (4, 0.7), "waiting": (2, 0.7), "finished": (8.2, 2), "stopped": (8.2, 3.3), "failed": (8.2, 0.7),
}  # fmt: skip
_COLOUR = {"training": COLOURS[1], "finished": COLOURS[0], "stopped": "#777777", "failed": COLOURS[4]}


def states() -> bytes:
    """All states, and an arrow for every transition that the controller may decide on; those that end the job are faint."""
    made, (axes,) = figure(11, 4.6)
    for start, stop in sorted(transitions()):
        _arrow(axes, _PLACES[start], _PLACES[stop])
    for state, (x, y) in _PLACES.items():
        colour = _COLOUR.get(state, FAINT)
        ink = "white" if state in _COLOUR else INK
        look = {"boxstyle": "round,pad=0.55", "facecolor": colour, "edgecolor": "white", "linewidth": 2}
        axes.text(x, y, state, ha="center", va="center", fontsize=11, color=ink, bbox=look, zorder=3)
    axes.set_xlim(-0.8, 9)
    axes.set_ylim(0.2, 3.9)
    bare(axes)
    title(axes, "the states of a job, and every transition that the code of the controller allows")
    return png(made)


def transitions() -> set[tuple[str, str]]:
    """Pairs of states, from ``machine.decide`` and what it calls; from one to itself left out."""
    tree = ast.parse(inspect.getsource(machine))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found = set()
    for states, handler in _handlers(functions["decide"]):
        for state in states:
            found |= {(state, to) for to in _reached(functions, handler, set()) if to != state}
    return {(start, to) for start, to in found if start not in ENDED}


def _handlers(decide: ast.FunctionDef) -> Iterator[tuple[list[str], str]]:
    """The states of every comparison in ``decide``, and the function that it leads to."""
    for node in ast.walk(decide):
        if isinstance(node, ast.If | ast.IfExp) and isinstance(node.test, ast.Compare):
            calls = [inner for part in _body(node) for inner in ast.walk(part) if isinstance(inner, ast.Call)]
            (call,) = [inner.func.id for inner in calls if isinstance(inner.func, ast.Name)]
            yield [str(word.value) for word in ast.walk(node.test) if isinstance(word, ast.Constant)], call


def _body(node: ast.If | ast.IfExp) -> list[Any]:
    return [node.body] if isinstance(node, ast.IfExp) else list(node.body)


def _reached(functions: dict[str, ast.FunctionDef], name: str, seen: set[str]) -> set[str]:
    """The states that a function, or one that it calls, decides on."""
    if name in seen or name not in functions:
        return set()
    seen.add(name)
    found = set()
    for node in ast.walk(functions[name]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "Transition" and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
            found |= _reached(functions, node.func.id, seen)
    return found


def _arrow(axes: Any, start: tuple[float, float], stop: tuple[float, float]) -> None:
    ends = stop in [_PLACES[state] for state in ENDED]
    colour, width = ("#d8dde5", 1.0) if ends else ("#7f8b9c", 1.4)
    bend = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=0.14", "color": colour, "linewidth": width}
    axes.annotate("", xy=stop, xytext=start, arrowprops=bend | {"shrinkA": 24, "shrinkB": 27, "mutation_scale": 14})
