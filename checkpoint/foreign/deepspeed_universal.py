"""Universal checkpoints, as ``ds_to_universal`` of DeepSpeed converts native ones to. Imports no torch.

For every trained parameter there is a folder ``zero/NAME`` with a whole tensor for each kind of state, the *atoms*; the
files of the model are copies of the native ones, and still have the frozen weights and the buffers, which the library
itself leaves unread. Names of tensors are those of ``evermesh.checkpoint.foreign.deepspeed``. Method: Lian et al.,
Universal Checkpointing, USENIX ATC 2025, section 3; format: as found in files of version 0.19.8.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import JsonValue

from evermesh.checkpoint.errors import DAMAGE, ForeignUnusable
from evermesh.checkpoint.foreign.deepspeed_files import find_files
from evermesh.checkpoint.foreign.deepspeed_grid import Grid
from evermesh.checkpoint.foreign.deepspeed_model import (
    AGAIN,
    BUFFER,
    PARAMETER,
    SCALER,
    read,
    settings_of,
)
from evermesh.checkpoint.foreign.fragments import whole
from evermesh.checkpoint.foreign.torch_files import TorchTensor
from evermesh.checkpoint.foreign.values import Values, number
from evermesh.checkpoint.format import StoredTensor
from evermesh.checkpoint.sources import Source, plain_files
from evermesh.checkpoint.stores.looking import files_in, is_file
from evermesh.checkpoint.stores.places import Place
from evermesh.checkpoint.stores.store import store_of

_ATOMS, _SETTINGS = "zero", "optimizer_state.pt"
_MASTER = "fp32"


def open_universal(path: Place) -> Source:
    """Index a universal folder.

    Raises:
        ForeignUnusable: files are missing or damaged, or of another layout.
    """
    files = find_files(path, universal=True)
    try:
        return _source(path, Grid(path, files, Values(path)), has_layers=bool(files.layers))
    except DAMAGE as error:
        if isinstance(error, ForeignUnusable):
            raise
        fact = f"its files are not as DeepSpeed converts them ({type(error).__name__}: {str(error)[:100]})"
        raise ForeignUnusable(path, fact, AGAIN) from error


def _source(path: Place, grid: Grid, *, has_layers: bool) -> Source:
    """``has_layers``: there are files of layers, without which weights of a pipeline are in atoms only."""
    values = grid.values
    atoms = set(store_of(path).folders(path / _ATOMS))
    trained = grid.trained()
    kept = grid.buffers() | {PARAMETER + n: t for n, t in grid.frozen(trained).items()}
    if grid.first["module"] is None and not has_layers:
        values.left_out.append("frozen weights and buffers of a pipeline, whose files of layers are not here")
    shapes = {name: of_ranks[0] for name, of_ranks in trained.items()} if grid.ranks == 1 else {}
    tensors, numbers = dict[str, StoredTensor](), dict[str, dict[str, Any]]()
    for name in sorted(atoms):
        if BUFFER + name in kept or PARAMETER + name in kept:
            continue  # of a frozen weight or a buffer there may be an atom too, converted to float32
        for kind, found in _atoms(path / _ATOMS / name):
            if (kind not in (_MASTER, "step") and isinstance(found, TorchTensor)) or kind == _MASTER:
                key = PARAMETER + name if kind == _MASTER else f"{kind}.{name}"
                tensors[key] = whole(path, key, _shaped(path, key, found, shapes.get(name)))
            else:
                value = number(found) if isinstance(found, TorchTensor) else found
                numbers.setdefault(name, {})[kind] = value
    kinds = {key.removesuffix(name) for name in trained for key in tensors if key.endswith(f".{name}")}
    tensors = grid.with_aliases(tensors | kept, kinds)
    objects = grid.objects() | _settings(path, grid, numbers)
    tensors |= {place: whole(path, place, tensor) for place, tensor in values.tensors.items()}
    files = plain_files(path, tensors)
    description = grid.description()
    return Source(
        path, "deepspeed-universal", tensors, files, objects, description, grid.step, left_out=tuple(values.left_out)
    )


def _atoms(folder: Place) -> Iterator[tuple[str, Any]]:
    for file in files_in(folder):
        if not file.name.endswith(".pt"):
            continue
        found = read(file)
        yield file.name.removesuffix(".pt"), found["param"] if isinstance(found, dict) else found


def _shaped(path: Place, name: str, atom: Any, shape: tuple[int, ...] | None) -> TorchTensor:
    """Atoms of ZeRO 3 are flat; their shapes are those of the model."""
    if not isinstance(atom, TorchTensor):
        raise ForeignUnusable(path, f"{name} is no tensor", AGAIN)
    if len(atom.shape) != 1 or shape is None or atom.shape == shape:
        return atom
    if atom.num_elements != math.prod(shape) or not atom.is_contiguous:
        raise ForeignUnusable(path, f"{name} is of {list(atom.shape)}, its parameter of {list(shape)}", AGAIN)
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return replace(atom, shape=shape, stride=strides)


def _settings(path: Place, grid: Grid, numbers: dict[str, dict[str, Any]]) -> dict[str, JsonValue]:
    """Hyper-parameters and numbers of the groups, by the names of their parameters, and the loss scaler."""
    file = path / _ATOMS / _SETTINGS
    saved = read(file) if is_file(file) else {}
    groups: list[dict[str, Any]] = saved.get("param_groups", [])
    states = saved.get("optimizer_state_dict", {}).get("state", {})  # of rank 0, where parameters were partitioned
    found: list[JsonValue] = []
    for index, (group, settings) in enumerate(zip(groups, settings_of(groups, grid.stages[0][0].shapes), strict=True)):
        of_group = next((numbers[name] for name in settings["names"] if name in numbers), {})
        if not of_group and group["params"]:
            state = states.get(group["params"][0], {})
            of_group = {k: v for k, v in state.items() if not isinstance(v, TorchTensor) or not v.shape}
        found.append(grid.values.json(settings | {"numbers": of_group}, f"groups[{index}]"))
    scaler = grid.values.objects({key: saved[key] for key in SCALER if key in saved}, "")
    return {"groups": found, "scaler": scaler}
