"""Any checkpoint into any layout of ours, bit for bit with the states of the optimizer: a table of pairs."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from evermesh.checkpoint.naming import Naming
from evermesh.checkpoint.opening import open_checkpoint
from evermesh.checkpoint.sources import with_prefixes
from evermesh.runtime.model.families import written_form
from tests.checkpoint.foreign_loads import assert_loads
from tests.checkpoint.matrix_saves import LAYOUTS, Save, config, like, made_up, save_ours, save_torch, save_zero
from tests.cluster import run_ranks

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
SOURCES = (
    Save("zero1", "dense", 1),
    Save("zero1", "dense", 3, "sgd"),
    Save("zero1", "dense", 4, "adamw", "bfloat16"),
    Save("zero2", "dense", 2, "lion"),
    Save("zero2", "dense", 5),
    Save("zero3", "dense", 1),
    Save("zero3", "dense", 3, "sgd"),
    Save("zero3", "dense", 5, "lion", "bfloat16"),
    Save("zero1", "dense", 2),
    Save("zero3", "dense", 2),
    Save("torch", "dense", 3),
    Save("safetensors", "dense", 3),
    Save("hugging face", "dense", 1),
    Save("pp 2 hdp 2 tp 2", "dense", 8),
    Save("hdp 3", "dense", 3),
    Save("zero1", "experts", 2),
    Save("zero2", "experts", 3, "lion"),
    Save("zero3", "experts", 2),
    Save("torch", "experts", 3),
    Save("safetensors", "experts", 2),
    Save("hdp 2 tp 2 ep 4", "experts", 4),
    Save("pp 2 hdp 2 tp 2 ep 2 etp 2", "experts", 8),
)
UNIVERSAL = (Save("zero1", "dense", 2), Save("zero3", "dense", 2))
"""Read in the universal form instead."""
TARGETS = {
    "dense": ("alone", "hdp 5", "pp 2 hdp 2", "interleaved pp 2 tp 2", "pp 2 hdp 2 tp 2", "hdp 4 divided"),
    "experts": ("alone", "hdp 2 tp 2 ep 4", "pp 2 hdp 2 tp 2 ep 2 etp 2", "hdp 4 ep 2 divided"),
}
PAIRS = [(source, target) for source in SOURCES for target in TARGETS[source.model]]
SLICE = {
    (Save("safetensors", "experts", 2), "hdp 4 ep 2 divided"),
    (Save("torch", "dense", 3), "interleaved pp 2 tp 2"),
    (Save("safetensors", "dense", 3), "hdp 5"),
    (Save("hugging face", "dense", 1), "pp 2 hdp 2"),
    (Save("hdp 2 tp 2 ep 4", "experts", 4), "pp 2 hdp 2 tp 2 ep 2 etp 2"),
    (Save("hdp 3", "dense", 3), "hdp 4 divided"),
}
"""For each run of the tests; all others are ``parity``."""
Saved = Callable[[Save], tuple[Path, dict[str, Tensor], Naming | None]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Saved:
    """Saves what is asked for, with all that the same ranks are asked for in this run; says where, and what it held."""
    folder = tmp_path_factory.mktemp("matrix")
    asked = {_params(item).get("source") for item in request.session.items}

    def find(source: Save) -> tuple[Path, dict[str, Tensor], Naming | None]:
        path = folder / source.name
        if not path.exists():
            saver = _SAVERS.get(source.library, save_ours)
            same = [s for s in SOURCES if s in asked and s.ranks == source.ranks]
            together = [s for s in same if _SAVERS.get(s.library, save_ours) == saver]
            run_ranks(source.ranks, saver, str(folder), together, timeout_s=170.0)
        if source.library.startswith("zero"):
            return _form(path, source), torch.load(path / "live.pt"), None
        if source.library == "hugging face":
            return path, *_weights(source)
        return (path if source.library in _SAVERS else path / "step-00000003"), made_up(source.model), None

    return find


def _params(item: Any) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def _form(path: Path, source: Save) -> Path:
    if source not in UNIVERSAL:
        return path
    if not (path / "universal").exists():
        from tests.checkpoint.test_deepspeed_checkpoints import convert

        convert(path / "global_step2", path / "universal")
    return path / "universal"


def _weights(source: Save) -> tuple[dict[str, Tensor], Naming]:
    """The weights of a made-up state, and what they are called in a family of Hugging Face."""
    weights = {n: tensor for n, tensor in made_up(source.model).items() if n.startswith("parameter.")}
    shapes = {name.partition(".")[2]: tuple(tensor.shape) for name, tensor in weights.items()}
    naming = written_form(config(source.model, "alone").model, shapes)[1]
    return weights, with_prefixes(naming, ("parameter.",), ("",))


def save_weights(rank: int, ranks: int, folder: str, cases: list[Save]) -> None:
    """As a directory of Hugging Face, by the library of its format."""
    for case in cases:
        weights, naming = _weights(case)
        theirs = {name: torch.empty(shape) for name, shape in naming.foreign_shapes.items()}
        for name, parts in naming.parts.items():
            for part in parts:
                box = weights[name][
                    tuple(slice(o, o + s) for o, s in zip(part.box.offsets, part.box.sizes, strict=True))
                ]
                theirs[part.name].flatten()[part.start : part.start + box.numel()] = box.flatten()
        path = Path(folder) / case.name
        path.mkdir()
        save_file(theirs, path / "model.safetensors")


_SAVERS: dict[str, Callable[..., None]] = {
    **{f"zero{stage}": save_zero for stage in (1, 2, 3)},
    "torch": save_torch,
    "safetensors": save_torch,
    "hugging face": save_weights,
}


def _marked(source: Save, target: str) -> Any:
    marks = [] if (source, target) in SLICE else [pytest.mark.parity]
    if source.library.startswith("zero"):
        marks.append(pytest.mark.skipif(not DEEPSPEED, reason="the extra deepspeed is missing"))
    form = "-universal" if source in UNIVERSAL else ""
    return pytest.param(source, target, marks=marks, id=f"{source.name}{form} into {target}")


@pytest.mark.parametrize(("source", "target"), [_marked(*pair) for pair in PAIRS])
def test_every_rank_gets_its_weights_and_states(source: Save, target: str, saved: Saved) -> None:
    path, whole, names = saved(source)
    layout = like(whole, source.model, target)
    assert_loads(open_checkpoint(path), whole, layout, range(config(source.model, target).layout.world_size), names)


def test_the_table_has_enough_pairs() -> None:
    assert len(PAIRS) >= 60
    assert {pair for pair in PAIRS if pair in SLICE} == SLICE
    assert {target for targets in TARGETS.values() for target in targets} <= LAYOUTS.keys()
